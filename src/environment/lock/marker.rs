//! Markers (PEP 508), which come with locks and wheels, so from anywhere.
//!
//! uv's parser reads each comparison; what `and`, `or` and parentheses make of them is found out here. It would make one
//! decision diagram of a whole marker, which doubles with every pair of `(a and b) or (c and d) or ...`: less than a
//! kilobyte takes minutes and gigabytes. It also recurses, and panics at characters outside ASCII.

use uv_pep508::{MarkerTree, VerbatimUrl};

/// The longest marker that is read, in bytes.
const LENGTH_MAX: usize = 64 * 1024;
/// How deep parentheses in a marker may be nested.
const DEPTH_MAX: usize = 64;

/// When something is wanted.
#[derive(Debug, Clone)]
pub(crate) enum Marker {
    /// All of these hold.
    All(Vec<Marker>),
    /// One of these holds.
    Any(Vec<Marker>),
    /// A comparison.
    Is(MarkerTree),
}

impl Marker {
    /// Reads a marker.
    ///
    /// # Errors
    /// Why it cannot be read.
    pub(crate) fn parse(text: &str) -> Result<Marker, String> {
        if !text.is_ascii() || text.len() > LENGTH_MAX {
            return Err("it is too long or has characters outside ASCII".into());
        }
        let mut rest = text;
        let marker = any(&mut rest, 0)?;
        match rest.trim_start() {
            "" => Ok(marker),
            more => Err(format!("there is more behind its end: {more}")),
        }
    }

    /// True when it holds, where `is` tells which comparisons do.
    pub(crate) fn holds(&self, is: &impl Fn(MarkerTree) -> bool) -> bool {
        match self {
            Marker::All(all) => all.iter().all(|marker| marker.holds(is)),
            Marker::Any(any) => any.iter().any(|marker| marker.holds(is)),
            Marker::Is(comparison) => is(*comparison),
        }
    }
}

fn any(rest: &mut &str, depth: usize) -> Result<Marker, String> {
    let mut found = vec![all(rest, depth)?];
    while takes_word(rest, "or") {
        found.push(all(rest, depth)?);
    }
    Ok(Marker::Any(found))
}

fn all(rest: &mut &str, depth: usize) -> Result<Marker, String> {
    let mut found = vec![one(rest, depth)?];
    while takes_word(rest, "and") {
        found.push(one(rest, depth)?);
    }
    Ok(Marker::All(found))
}

fn one(rest: &mut &str, depth: usize) -> Result<Marker, String> {
    let text = rest.trim_start();
    if let Some(inner) = text.strip_prefix('(') {
        if depth == DEPTH_MAX {
            return Err("its parentheses are nested too deep".into());
        }
        *rest = inner;
        let found = any(rest, depth + 1)?;
        *rest = rest.trim_start().strip_prefix(')').ok_or("a parenthesis is not closed")?;
        return Ok(found);
    }
    let (comparison, behind) = text.split_at(end_of_comparison(text));
    *rest = behind;
    let read = MarkerTree::parse_str::<VerbatimUrl>(comparison.trim());
    read.map(Marker::Is).map_err(|error| error.to_string())
}

/// Takes `word` from the beginning of `rest`, if it stands there.
fn takes_word(rest: &mut &str, word: &str) -> bool {
    let behind = rest.trim_start().strip_prefix(word).filter(|behind| !behind.starts_with(is_in_word));
    if let Some(behind) = behind {
        *rest = behind;
    }
    behind.is_some()
}

/// Where the comparison ends that `text` begins with.
fn end_of_comparison(text: &str) -> usize {
    let mut quote = None;
    let mut before = ' ';
    for (at, c) in text.char_indices() {
        let is_word = |word: &str| text[at..].strip_prefix(word).is_some_and(|behind| !behind.starts_with(is_in_word));
        match (quote, c) {
            (Some(open), _) if open == c => quote = None,
            (Some(_), _) => {}
            (None, '"' | '\'') => quote = Some(c),
            (None, '(' | ')') => return at,
            (None, _) if !is_in_word(before) && (is_word("and") || is_word("or")) => return at,
            (None, _) => {}
        }
        before = c;
    }
    text.len()
}

fn is_in_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '.')
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use proptest::prelude::*;
    use uv_normalize::ExtraName;
    use uv_pep508::MarkerEnvironment;

    use super::*;
    use crate::environment::interpreter::tests::cpython311;
    use crate::environment::lock::marker_environment;

    fn holds(marker: &str, environment: &MarkerEnvironment, extras: &[ExtraName]) -> Option<bool> {
        Some(Marker::parse(marker).ok()?.holds(&|comparison| comparison.evaluate(environment, extras)))
    }

    fn comparison() -> impl Strategy<Value = String> {
        prop_oneof![
            Just("os_name == 'posix'".into()),
            Just("'win32' == sys_platform".into()),
            Just("python_version >= \"3.9\"".into()),
            Just("python_full_version not in '3.11.7 3.12.0'".into()),
            Just("platform_release == 'and (or'".into()),
            "[a-e]".prop_map(|extra| format!("extra == '{extra}'")),
        ]
    }

    fn marker() -> impl Strategy<Value = String> {
        comparison().prop_recursive(4, 20, 3, |inner| {
            let joined = |word: &'static str| {
                prop::collection::vec(inner.clone(), 1..4).prop_map(move |parts| format!("({})", parts.join(word)))
            };
            prop_oneof![
                joined(" and "),
                joined("  or "),
                (inner.clone(), inner).prop_map(|(a, b)| format!("{a} or {b}"))
            ]
        })
    }

    proptest! {
        #[test]
        fn a_marker_says_what_uv_says_of_it(text in marker(), chosen in prop::collection::vec("[a-e]", 0..3)) {
            let environment = marker_environment(&cpython311().markers).unwrap();
            let extras: Vec<ExtraName> = chosen.iter().map(|extra| ExtraName::from_str(extra).unwrap()).collect();
            let whole = MarkerTree::parse_str::<VerbatimUrl>(&text).unwrap();
            prop_assert_eq!(holds(&text, &environment, &extras), Some(whole.evaluate(&environment, &extras)), "{}", text);
        }
    }

    #[test]
    fn a_marker_takes_no_longer_than_it_is_long() {
        let environment = marker_environment(&cpython311().markers).unwrap();
        let pairs =
            |n: usize| (0..n).map(|i| format!("(extra == 'x{i:04}' and extra == 'y{i:04}')")).collect::<Vec<_>>();
        let long = pairs(1000).join(" or ");
        let chosen = ["x0999", "y0999"].map(|extra| ExtraName::from_str(extra).unwrap());
        assert_eq!(holds(&long, &environment, &chosen), Some(true));
        assert_eq!(holds(&long, &environment, &chosen[..1]), Some(false));
    }

    #[test]
    fn what_is_no_marker_is_refused() {
        let deep = "(".repeat(DEPTH_MAX + 1) + "os_name == 'posix'" + &")".repeat(DEPTH_MAX + 1);
        for wrong in [
            "",
            " ",
            "()",
            "os_name",
            "os_name == 'posix",
            "os_name == 'posix' and",
            "or os_name == 'posix'",
            &deep,
            "(os_name == 'posix'",
            "os_name == 'posix')",
            "os_name == 'posix' os_name == 'nt'",
            "os_name == 'ß'",
            "os_name == 'posix' andor os_name == 'nt'",
        ] {
            assert!(Marker::parse(wrong).is_err(), "{wrong:?}");
        }
        assert!(Marker::parse(&deep[1..deep.len() - 1]).is_ok());
    }
}
