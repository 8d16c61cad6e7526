//! `RECORD` files: which paths a distribution says it installed.
//!
//! uv copies hashes without checking them, leaves dead or doubled lines, and records some paths wrongly, so a `RECORD`
//! only says whose a file is; digests are taken from the files.

/// One line: the path as written, and the whole line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) path: String,
    text: String,
}

/// Splits a RECORD into its lines. A path may be quoted and may hold commas, doubled quotes and line breaks.
pub(crate) fn parse(text: &str) -> Vec<Line> {
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (mut end, mut quoted) = (rest.len(), false);
        for (at, c) in rest.char_indices() {
            match c {
                '"' => quoted = !quoted,
                '\n' if !quoted => {
                    end = at;
                    break;
                }
                _ => {}
            }
        }
        let line = rest[..end].trim_end_matches('\r');
        rest = rest.get(end + 1..).unwrap_or_default();
        if line.trim().is_empty() {
            continue;
        }
        let path = match line.strip_prefix('"') {
            Some(inner) => unquote(inner),
            None => line.split(',').next().unwrap_or_default().to_string(),
        };
        lines.push(Line { path, text: line.to_string() });
    }
    lines
}

fn unquote(inner: &str) -> String {
    let mut out = String::new();
    let mut chars = inner.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' if chars.peek() == Some(&'"') => {
                chars.next();
                out.push('"');
            }
            '"' => break,
            _ => out.push(c),
        }
    }
    out
}

/// The RECORD without the lines whose path `drop` names; order and wording of the others stay as uv wrote them.
pub(crate) fn rewrite(lines: &[Line], drop: impl Fn(&str) -> bool) -> String {
    lines.iter().filter(|line| !drop(&line.path)).map(|line| format!("{}\n", line.text)).collect()
}

/// Resolves a path of a RECORD, which is relative to `site_packages`, to one below the venv.
/// None when it is absolute or leaves the venv.
pub(crate) fn resolve(site_packages: &str, path: &str) -> Option<Vec<u8>> {
    if path.starts_with('/') || path.contains('\0') {
        return None;
    }
    let mut parts: Vec<&str> = site_packages.split('/').collect();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            name => parts.push(name),
        }
    }
    // A venv's lib64 is a link to its lib, and some wheels install through it.
    if let [first, _, ..] = parts.as_mut_slice()
        && *first == "lib64"
    {
        *first = "lib";
    }
    Some(parts.join("/").into_bytes())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn paths_with_commas_and_quotes_are_read() {
        let text = "../../../bin/x,sha256=a,1\n\"a,\"\"b\"\".py\",sha256=b,2\r\n\nplain.py,,\n";
        let paths: Vec<String> = parse(text).into_iter().map(|l| l.path).collect();
        assert_eq!(paths, ["../../../bin/x", "a,\"b\".py", "plain.py"]);
        assert_eq!(
            rewrite(&parse(text), |p| p == "plain.py"),
            "../../../bin/x,sha256=a,1\n\"a,\"\"b\"\".py\",sha256=b,2\n"
        );
    }

    #[test]
    fn a_path_never_leaves_the_venv() {
        let sp = "lib/python3.11/site-packages";
        for (path, expected) in [
            ("x.py", Some("lib/python3.11/site-packages/x.py")),
            ("../../../bin/x", Some("bin/x")),
            ("../../../../x", None),
            ("/etc/passwd", None),
            ("../../../lib64/python3.11/site-packages/y.so", Some("lib/python3.11/site-packages/y.so")),
            ("../../../lib64", Some("lib64")),
            ("a/../b//./c", Some("lib/python3.11/site-packages/b/c")),
        ] {
            assert_eq!(resolve(sp, path), expected.map(|e| e.as_bytes().to_vec()), "{path}");
        }
    }

    proptest! {
        #[test]
        fn no_record_makes_it_panic(text in "(?s).{0,200}") {
            for line in parse(&text) {
                if let Some(path) = resolve("lib/python3.11/site-packages", &line.path) {
                    prop_assert!(!path.split(|b| *b == b'/').any(|part| part == b".."));
                }
            }
        }
    }
}
