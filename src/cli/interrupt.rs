//! Ctrl-C and SIGTERM during long work: it ends at once, with exit code 130.

use std::process;
use std::thread;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::error::{IoContext, Kind, Result};
use crate::mount;

/// From now on SIGINT and SIGTERM run `clean_up` and end the process.
///
/// Nothing needs to be undone: what is published is whole, and what is not lies in directories that the next command
/// clears. Children die with this process.
pub(super) fn exit_on_signal(clean_up: impl FnOnce() + Send + 'static) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).at("waiting for", "signals")?;
    thread::spawn(move || {
        if signals.forever().next().is_some() {
            clean_up();
            mount::end_trials();
            eprintln!("interrupted");
            process::exit(i32::from(Kind::Interrupted.exit_code()));
        }
    });
    Ok(())
}
