//! Environment names, `<workflow>/<node>`.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Kind, Result};

/// The longest workflow or node name, in bytes.
const NAME_MAX: usize = 100;

/// The name of an environment: a workflow and a node in it.
///
/// Both halves are 1 to 100 characters of `A-Z a-z 0-9 . _ -`, begin with a letter or digit and do not end with a
/// full stop. So a name is always one ordinary path component on every file system, is never hidden, never an option,
/// and never collides with what the mount itself shows (`.venv`, `.versions`).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EnvName {
    workflow: String,
    node: String,
}

impl EnvName {
    /// Checks both halves.
    pub fn new(workflow: &str, node: &str) -> Result<Self> {
        check_part("workflow", workflow)?;
        check_part("node", node)?;
        Ok(EnvName { workflow: workflow.into(), node: node.into() })
    }

    /// The half before the slash.
    pub fn workflow(&self) -> &str {
        &self.workflow
    }

    /// The half behind the slash.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// True when `text` may stand as a workflow or a node.
    pub fn is_part(text: &str) -> bool {
        check_part("name", text).is_ok()
    }
}

fn check_part(what: &str, text: &str) -> Result<()> {
    let reason = if text.is_empty() {
        "is empty".to_string()
    } else if text.len() > NAME_MAX {
        format!("is longer than {NAME_MAX} characters")
    } else if let Some(bad) = text.chars().find(|c| !(c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))) {
        format!("contains {bad:?}")
    } else if !text.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        "does not begin with a letter or digit".to_string()
    } else if text.ends_with('.') {
        "ends with a full stop".to_string()
    } else {
        return Ok(());
    };
    let shown: String = text.chars().take(40).collect();
    Err(Error::new(Kind::Usage, format!("{what} name {shown:?} {reason}"))
        .hint("names are 1-100 characters of A-Z a-z 0-9 . _ - and begin with a letter or digit"))
}

impl FromStr for EnvName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.split_once('/') {
            Some((workflow, node)) => EnvName::new(workflow, node),
            None => Err(Error::new(Kind::Usage, format!("environment name {text:?} has no slash"))
                .hint("write WORKFLOW/NODE, for example demo/train")),
        }
    }
}

impl fmt::Display for EnvName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.workflow, self.node)
    }
}

impl fmt::Debug for EnvName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

serde_as_text!(EnvName);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_outside_the_safe_set_are_refused() {
        for good in ["demo/a", "a/b", "ETL-2024.q1/train_model", "0/9", &format!("{0}/{0}", "x".repeat(100))] {
            assert_eq!(good.parse::<EnvName>().map(|n| n.to_string()).ok().as_deref(), Some(good));
        }
        for bad in [
            "",
            "/",
            "demo",
            "demo/",
            "/a",
            "a/b/c",
            "../a",
            "a/..",
            "./a",
            "a/.venv",
            "-x/a",
            "a/-x",
            "a b/c",
            "a/é",
            "a/b\n",
            "a\0/b",
            "a/b.",
            "_a/b",
            &format!("{}/b", "x".repeat(101)),
            "a/b\\c",
            "a/*",
            "a/$(x)",
        ] {
            assert!(bad.parse::<EnvName>().is_err(), "{bad:?}");
        }
    }
}
