//! `WORKFLOW/NODE` or `WORKFLOW/NODE@VERSION`, as verbs take it.

use std::str::FromStr;

use crate::environment::{EnvName, Version};
use crate::error::{Error, Kind, Result};
use crate::store::Store;

/// An environment and perhaps one of its versions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EnvSpec {
    pub(crate) name: EnvName,
    pub(crate) version: Option<u64>,
}

impl EnvSpec {
    /// The version that is meant: the named one, else the current.
    pub(crate) fn resolve(&self, store: &Store) -> Result<Version> {
        match self.version {
            Some(number) => store.version(&self.name, number),
            None => store.current(&self.name),
        }
    }
}

impl FromStr for EnvSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, version) = match text.split_once('@') {
            None => (text, None),
            Some((name, number)) => {
                let number = number.parse().ok().filter(|n| *n > 0).ok_or_else(|| {
                    Error::new(Kind::Usage, format!("{number:?} is not a version number")).hint("write WORKFLOW/NODE@3")
                })?;
                (name, Some(number))
            }
        };
        Ok(EnvSpec { name: name.parse()?, version })
    }
}

/// A path for clap; empty (a variable that is set to nothing) counts as not given, further on.
pub(crate) fn path(text: &str) -> Result<std::path::PathBuf, String> {
    Ok(text.into())
}

/// An [`EnvName`] for clap, which shows an error's hint with its message.
pub(crate) fn name(text: &str) -> Result<EnvName, String> {
    text.parse().map_err(told)
}

/// A workflow for clap.
pub(crate) fn workflow(text: &str) -> Result<String, String> {
    // Checked as the half of a name that it is.
    EnvName::new(text, "node").map(|name| name.workflow().into()).map_err(told)
}

/// The name of an environment, or of a workflow, for clap.
pub(crate) fn name_or_workflow(text: &str) -> Result<String, String> {
    if text.contains('/') { name(text).map(|name| name.to_string()) } else { workflow(text) }
}

/// An [`EnvSpec`] for clap.
pub(crate) fn spec(text: &str) -> Result<EnvSpec, String> {
    text.parse().map_err(told)
}

/// A time as people write it for clap: `24h`, `30d`, `2w 12h`; a day has 24 hours.
pub(crate) fn duration(text: &str) -> Result<std::time::Duration, String> {
    let wrong = || format!("{text:?} is not a time: write for example 90m, 24h or 30d");
    let span: jiff::Span = text.parse().map_err(|_| wrong())?;
    let time = span.to_duration(jiff::SpanRelativeTo::days_are_24_hours()).map_err(|_| wrong())?;
    time.try_into().map_err(|_| wrong())
}

fn told(error: Error) -> String {
    match error.hint_text() {
        Some(hint) => format!("{error}: {hint}"),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_people_do() {
        let hours = |n: u64| std::time::Duration::from_secs(n * 3600);
        for (text, time) in [("24h", hours(24)), ("30d", hours(720)), ("2w 12h", hours(348)), ("0s", hours(0))] {
            assert_eq!(duration(text).unwrap(), time);
        }
        for wrong in ["", "x", "5", "-3h", "1y", "1mo"] {
            assert!(duration(wrong).unwrap_err().contains("24h"), "{wrong}");
        }
    }

    #[test]
    fn a_version_is_a_positive_number_behind_an_at_sign() {
        assert_eq!(spec("a/b@3").unwrap().version, Some(3));
        assert_eq!(spec("a/b").unwrap().version, None);
        for bad in ["a/b@", "a/b@0", "a/b@-1", "a/b@x", "a@3", "@3", "a/b@99999999999999999999999"] {
            assert!(spec(bad).is_err(), "{bad}");
        }
    }
}
