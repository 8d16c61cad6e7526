//! What a build tells while it runs. How it is shown is not decided here.

/// Takes in what happens, from any thread.
pub trait Progress: Sync {
    /// Something happened.
    fn event(&self, event: &Event<'_>);
}

/// Tells nobody.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn event(&self, _: &Event<'_>) {}
}

/// One event of a build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    /// A step of the whole begins.
    Step(Step),
    /// The lock is known: so many packages, of which so many have layers already.
    Planned {
        /// All packages.
        packages: usize,
        /// Those with a layer in the store.
        known: usize,
    },
    /// Something happened to one package. Not complete: uv tells of small downloads nothing.
    Package {
        /// Name as uv or the lock writes it.
        name: &'a str,
        /// What.
        state: PackageState<'a>,
    },
    /// So many of the files to compile are done.
    Compiled {
        /// Files done.
        done: usize,
        /// All files.
        total: usize,
    },
    /// A sentence for people that belongs to no step.
    Note(&'a str),
}

/// A step of a build, in the order they come; not every build has every one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Another process on this machine does the same; waiting for it.
    Waiting,
    /// An interpreter is looked for.
    FindingInterpreter,
    /// An interpreter is copied into the store and proved.
    AddingInterpreter,
    /// uv chooses versions.
    Resolving,
    /// uv fetches, builds and installs what has no layer yet.
    Installing,
    /// Bytecode is made.
    Compiling,
    /// Layers are written.
    Storing,
    /// The result is checked.
    Validating,
    /// The version is made current.
    Publishing,
}

/// What happened to a package.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PackageState<'a> {
    /// uv fetches it; its size as uv writes it (`17.4MiB`).
    Downloading(&'a str),
    /// uv has it.
    Downloaded,
    /// uv builds it from source.
    Building,
    /// uv built it.
    Built,
    /// uv installed it into the staging venv.
    Installed,
    /// Its layer is in the store.
    Stored,
}

/// Reads one line of uv's stderr; none when it tells of no package.
pub(super) fn parse_line(line: &str) -> Option<Event<'_>> {
    let (verb, rest) = line.trim().split_once(' ')?;
    let rest = rest.trim();
    let name = rest.split("==").next().unwrap_or(rest).split(" @ ").next().unwrap_or(rest);
    let state = match verb {
        "Downloading" => {
            let (name, size) = rest.split_once(" (")?;
            let state = PackageState::Downloading(size.trim_end_matches(')'));
            return Some(Event::Package { name, state });
        }
        "Downloaded" => PackageState::Downloaded,
        "Building" => PackageState::Building,
        "Built" => PackageState::Built,
        "+" => PackageState::Installed,
        _ => return None,
    };
    (!name.is_empty() && !name.contains(' ')).then_some(Event::Package { name, state })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_uv_become_events() {
        use PackageState::*;
        for (line, name, state) in [
            ("Downloading numpy (17.4MiB)", "numpy", Downloading("17.4MiB")),
            (" Downloaded numpy", "numpy", Downloaded),
            ("   Building docopt==0.6.2", "docopt", Building),
            ("   Building foo-src @ file:///tmp/q1/srcdir", "foo-src", Building),
            ("      Built docopt==0.6.2", "docopt", Built),
            (" + foo==1.0 (from file:///x)", "foo", Installed),
        ] {
            assert_eq!(parse_line(line), Some(Event::Package { name, state }), "{line}");
        }
        for line in ["Resolved 11 packages in 1.30s", "", "error: x", " - six==1.16.0", "Downloading"] {
            assert_eq!(parse_line(line), None, "{line}");
        }
    }
}
