//! Paths that two layers of a version have with different content.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::Context;
use crate::environment::{Conflict, Digest};
use crate::error::Result;
use crate::store::{LayerDoc, Node};

/// So many are kept in a version document.
const KEPT: usize = 100;

/// The conflicts between `layers`, of which later ones win. What was found of a pair once is noted in the index, so a
/// version of known layers opens no catalog.
pub(super) fn find(context: &Context<'_>, layers: &[Arc<LayerDoc>]) -> Result<Vec<Conflict>> {
    let mut catalogs: HashMap<Digest, BTreeMap<Vec<u8>, Node>> = HashMap::new();
    let mut conflicts = Vec::new();
    for (lower, upper) in candidates(layers) {
        let (hidden, shown) = (&layers[lower], &layers[upper]);
        let mut pair = [hidden.digest, shown.digest];
        pair.sort();
        let note = format!("paths in both {} and {}", pair[0], pair[1]);
        let known = context.index.note(&note)?.and_then(|text| serde_json::from_str::<Vec<String>>(&text).ok());
        let paths = match known {
            Some(paths) => paths,
            None => {
                for digest in pair {
                    if let std::collections::hash_map::Entry::Vacant(place) = catalogs.entry(digest) {
                        let doc = if digest == hidden.digest { hidden } else { shown };
                        let catalog = context.store.catalog_of(doc)?;
                        let mut rows = BTreeMap::new();
                        for row in catalog.all()? {
                            rows.insert(catalog.path_of(row.id)?, row.node);
                        }
                        place.insert(rows);
                    }
                }
                let paths = differing(&catalogs[&pair[0]], &catalogs[&pair[1]]);
                context.index.set_note(&note, &serde_json::to_string(&paths).unwrap_or_default())?;
                paths
            }
        };
        let conflict = |path| Conflict { path, shown: shown.meta.name.clone(), hidden: hidden.meta.name.clone() };
        conflicts.extend(paths.into_iter().map(conflict));
    }
    conflicts.sort_by(|a, b| (&a.path, &a.hidden).cmp(&(&b.path, &b.hidden)));
    conflicts.truncate(KEPT);
    Ok(conflicts)
}

/// Paths that both have and that differ, at most [`KEPT`]; directories that both have do not differ, and bytecode does
/// where its source does.
fn differing(a: &BTreeMap<Vec<u8>, Node>, b: &BTreeMap<Vec<u8>, Node>) -> Vec<String> {
    let same = |x: &Node, y: &Node| match (x, y) {
        (Node::Dir { .. }, Node::Dir { .. }) => true,
        (Node::File { digest: one, executable: x1, .. }, Node::File { digest: two, executable: x2, .. }) => {
            one == two && x1 == x2
        }
        (Node::Symlink { target: one }, Node::Symlink { target: two }) => one == two,
        _ => false,
    };
    let (small, large) = if a.len() <= b.len() { (a, b) } else { (b, a) };
    let is_bytecode = |path: &[u8]| path.split(|b| *b == b'/').any(|part| part == b"__pycache__");
    let paths = small.iter().filter(|(path, node)| large.get(*path).is_some_and(|other| !same(node, other)));
    paths
        .filter(|(path, _)| !is_bytecode(path))
        .take(KEPT)
        .map(|(path, _)| String::from_utf8_lossy(path).into_owned())
        .collect()
}

/// Pairs of layers, lower first, of which one claims a path that the other claims too or something below it.
fn candidates(layers: &[Arc<LayerDoc>]) -> BTreeSet<(usize, usize)> {
    let mut claims: BTreeMap<Vec<&str>, Vec<usize>> = BTreeMap::new();
    for (number, layer) in layers.iter().enumerate() {
        for claim in &layer.claims {
            claims.entry(claim.split('/').collect()).or_default().push(number);
        }
    }
    let mut pairs = BTreeSet::new();
    let mut above: Vec<(&Vec<&str>, &Vec<usize>)> = Vec::new();
    for (path, numbers) in &claims {
        while above.last().is_some_and(|(parent, _)| !path.starts_with(parent)) {
            above.pop();
        }
        above.push((path, numbers));
        for (_, others) in &above {
            for a in numbers {
                pairs.extend(others.iter().filter(|b| *b != a).map(|b| (*a.min(b), *a.max(b))));
            }
        }
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{LayerKind, LayerMeta};

    fn layer(name: &str, claims: &[&str]) -> Arc<LayerDoc> {
        let meta = LayerMeta {
            kind: LayerKind::Wheel,
            name: name.into(),
            version: "1".into(),
            abi: String::new(),
            requires: vec![],
            requires_python: None,
            startup_files: vec![],
            uncompiled: BTreeMap::new(),
            bytecode: true,
        };
        let claims = claims.iter().map(|c| c.to_string()).collect();
        let digest = Digest::of(name.as_bytes());
        Arc::new(LayerDoc { claims, ..LayerDoc::bare(digest, meta) })
    }

    #[test]
    fn only_layers_with_touching_claims_are_compared() {
        let layers = [
            layer("a", &["bin/x", "lib/s/google"]),
            layer("b", &["bin/xy", "lib/s/google", "lib/s/google-b"]),
            layer("c", &["bin/x/y", "lib/s/c"]),
            layer("d", &["lib/s/d"]),
        ];
        assert_eq!(candidates(&layers).into_iter().collect::<Vec<_>>(), [(0, 1), (0, 2)]);
    }
}
