//! One error type for the whole program.
//!
//! An [`Error`] says what happened, to which object, and what to do next. Its [`Kind`] is the only thing that decides
//! an exit code ([`Kind::exit_code`]) or an errno ([`Kind::errno`]); both mappings live here and nowhere else.

use std::fmt;
use std::io;
use std::path::Path;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What sort of failure this is; decides exit code and errno.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The caller asked in a way that cannot be understood (a bad name, a bad flag, a bad config file).
    Usage,
    /// Something named by the caller does not exist.
    NotFound,
    /// Input from outside (a lock, a wheel, a requirement) is not acceptable.
    Invalid,
    /// Bytes on disk are not what their name or document says.
    Corrupt,
    /// This program, kernel or machine cannot do what was asked.
    Unsupported,
    /// Something else is in the way now (a busy mount point, a lock).
    Busy,
    /// The operating system refused, with this errno.
    Os(i32),
    /// A step failed for a reason told in the message (a resolver, a validation).
    Failed,
    /// The caller interrupted.
    Interrupted,
    /// The store would have to be waited for where nothing may wait; whoever gets this asks again where that is allowed.
    WouldWait,
    /// The store has not answered in time.
    TimedOut,
    /// It is not signed as this machine asks for: unsigned, altered, by a key that is not trusted, or an old statement
    /// where a newer one was seen.
    Rejected,
    /// What was to be used again was collected meanwhile; it can be built again.
    Collected,
}

impl Kind {
    /// Process exit code: 1 it failed, 2 wrong usage, 130 interrupted.
    pub fn exit_code(self) -> u8 {
        match self {
            Kind::Usage => 2,
            Kind::Interrupted => 130,
            _ => 1,
        }
    }

    /// The errno that a file system call gets.
    pub fn errno(self) -> i32 {
        match self {
            Kind::NotFound => libc::ENOENT,
            Kind::Usage | Kind::Invalid => libc::EINVAL,
            Kind::Unsupported => libc::EOPNOTSUPP,
            Kind::Busy => libc::EBUSY,
            Kind::Os(errno) => errno,
            Kind::Corrupt | Kind::Failed | Kind::TimedOut | Kind::Collected => libc::EIO,
            Kind::Interrupted => libc::EINTR,
            Kind::WouldWait => libc::EAGAIN,
            Kind::Rejected => libc::EKEYREJECTED,
        }
    }

    /// One lower-case word for `--json` and logs.
    pub fn word(self) -> &'static str {
        match self {
            Kind::Usage => "usage",
            Kind::NotFound => "not-found",
            Kind::Invalid => "invalid",
            Kind::Corrupt => "corrupt",
            Kind::Unsupported => "unsupported",
            Kind::Busy => "busy",
            Kind::Os(_) => "os",
            Kind::Failed => "failed",
            Kind::Interrupted => "interrupted",
            Kind::WouldWait => "would-wait",
            Kind::TimedOut => "timed-out",
            Kind::Rejected => "rejected",
            Kind::Collected => "collected",
        }
    }
}

/// What happened, to which object, why, and what to do next.
pub struct Error(Box<Inner>);

struct Inner {
    kind: Kind,
    message: String,
    detail: Option<String>,
    hint: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// A failure of `kind`; `message` names the object, lower case, without a final full stop.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Error(Box::new(Inner { kind, message: message.into(), detail: None, hint: None, source: None }))
    }

    /// An operating system error while doing `what` (for example `reading`) to `path`.
    pub fn io(what: &str, path: &Path, source: io::Error) -> Self {
        let kind = match source.kind() {
            io::ErrorKind::NotFound => Kind::NotFound,
            _ => source.raw_os_error().map_or(Kind::Failed, Kind::Os),
        };
        let mut error = Error::new(kind, format!("{what} {} failed", path.display())).with_source(source);
        error.0.hint = match kind {
            Kind::Os(libc::ENOSPC) => Some("the disk is full: free some space and run the command again".into()),
            Kind::Os(libc::EDQUOT) => Some("the disk quota is used up: free some space and run again".into()),
            Kind::Os(libc::EROFS) => Some("that file system is read-only: name a writable place".into()),
            Kind::Os(libc::EACCES | libc::EPERM) => Some("check the owner and mode of that path".into()),
            _ => None,
        };
        error
    }

    /// Adds the next thing to do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// Adds words of somebody else, passed on as they are (what uv printed, say); may have several lines.
    #[must_use]
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.0.detail = Some(detail.into());
        self
    }

    /// Adds the underlying error.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Puts this error under a wider sentence and keeps its kind, hint and detail.
    #[must_use]
    pub fn context(mut self, message: impl Into<String>) -> Self {
        let message = message.into();
        let hint = self.0.hint.take();
        let detail = self.0.detail.take();
        let kind = self.0.kind;
        Error(Box::new(Inner { kind, message, detail, hint, source: Some(Box::new(self)) }))
    }

    /// The same for somebody else who waited for the same: with all words, but the causes are text.
    pub(crate) fn again(&self) -> Self {
        let mut again = Error::new(self.0.kind, self.chain());
        again.0.hint.clone_from(&self.0.hint);
        again.0.detail.clone_from(&self.0.detail);
        again
    }

    /// True when the store was not waited for, or not any longer: nothing is known of what was asked.
    pub fn is_about_waiting(&self) -> bool {
        matches!(self.0.kind, Kind::WouldWait | Kind::TimedOut)
    }

    /// The kind.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The errno for a file system call.
    pub fn errno(&self) -> i32 {
        self.0.kind.errno()
    }

    /// True when the named thing simply is not there.
    pub fn is_not_found(&self) -> bool {
        self.0.kind == Kind::NotFound
    }

    /// The next thing to do, where there is one.
    pub fn hint_text(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// Somebody else's words, where there are some.
    pub fn detail_text(&self) -> Option<&str> {
        self.0.detail.as_deref()
    }

    /// The message with every cause behind it, on one line.
    pub fn chain(&self) -> String {
        let mut text = self.0.message.clone();
        let mut next = std::error::Error::source(self);
        while let Some(cause) = next {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            next = cause.source();
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} [{}]", self.chain(), self.0.kind.word())?;
        if let Some(detail) = &self.0.detail {
            write!(f, "\n{detail}")?;
        }
        if let Some(hint) = &self.0.hint {
            write!(f, "\nhint: {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|s| &**s as &(dyn std::error::Error + 'static))
    }
}

/// Adds what was being done, to which path, to an [`io::Error`].
pub trait IoContext<T> {
    /// `what` is a participle: `reading`, `creating`.
    fn at(self, what: &str, path: impl AsRef<Path>) -> Result<T>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn at(self, what: &str, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|source| Error::io(what, path.as_ref(), source))
    }
}

impl<T> IoContext<T> for nix::Result<T> {
    fn at(self, what: &str, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|errno| Error::io(what, path.as_ref(), errno.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_keeps_kind_and_hint_under_context_and_tells_every_cause() {
        let io = io::Error::from_raw_os_error(libc::ENOSPC);
        let error = Error::io("writing", Path::new("/store/tmp/x"), io).context("publishing demo/a failed");
        assert_eq!(error.kind(), Kind::Os(libc::ENOSPC));
        assert_eq!(error.errno(), libc::ENOSPC);
        assert!(error.hint_text().is_some_and(|h| h.contains("disk is full")));
        let chain = error.chain();
        assert!(chain.starts_with("publishing demo/a failed: writing /store/tmp/x failed: "), "{chain}");
    }
}
