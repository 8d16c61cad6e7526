//! The command line: one file a verb, each a thin shell over the library.
//!
//! Every verb gets the `Context` (settings and output) and its own arguments, and prints through `Output`, which
//! knows about `--json` and closed pipes. Exit codes come from [`crate::error::Kind::exit_code`] alone.

pub(crate) mod cache;
mod completions;
pub(crate) mod config;
mod create;
mod daemon;
mod diff;
mod doctor;
mod fsck;
mod gc;
mod index;
mod init;
mod interrupt;
mod key;
mod list;
mod mount;
mod output;
mod owner;
mod profile;
mod progress;
mod python;
mod remove;
mod rollback;
mod run;
mod settings;
mod show;
mod signing;
pub(crate) mod spec;
mod stats;
mod versions;
mod warm;

use std::process::ExitCode;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::build::{self, Progress, Uv};
use crate::error::{Error, Kind, Result};
use crate::store::{Index, Store};
use output::Output;
use settings::Settings;

/// Python environments built ahead of time, stored once and mounted everywhere as ordinary interpreter paths.
#[derive(Debug, Parser)]
#[command(name = "envfabric", version, max_term_width = 100, subcommand_required = true, arg_required_else_help = true)]
#[command(after_help = "\
First steps:
  envfabric create demo/hello requests     build an environment
  envfabric run demo/hello -- python       run something in it
  envfabric mount                          show all of them as directories

Flags win over ENVFABRIC_* variables, those over the config file, that over the defaults
(store and mount under ~/.local/share/envfabric).")]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

/// Flags of every verb.
#[derive(Debug, Args)]
struct Global {
    /// Store directory [default: $XDG_DATA_HOME/envfabric/store]
    #[arg(long, value_name = "DIR", env = "ENVFABRIC_STORE", global = true, hide_env_values = true, value_parser = spec::path)]
    store: Option<std::path::PathBuf>,
    /// Config file [default: $XDG_CONFIG_HOME/envfabric/config.toml, then /etc/envfabric/config.toml]
    #[arg(long, value_name = "FILE", env = "ENVFABRIC_CONFIG", global = true, hide_env_values = true)]
    config: Option<std::path::PathBuf>,
    /// Print JSON on standard output, and errors as JSON on standard error
    #[arg(long, global = true)]
    json: bool,
    #[command(flatten)]
    signing: signing::SigningFlags,
    /// Say nothing but results and errors
    #[arg(long, short, global = true)]
    quiet: bool,
    /// Log more (repeat for still more); ENVFABRIC_LOG takes a filter
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Init(init::Init),
    Create(Box<create::Create>),
    Mount(mount::Mount),
    Umount(mount::Umount),
    Run(run::Run),
    Shell(run::Shell),
    List(list::List),
    Show(show::Show),
    Versions(versions::Versions),
    Diff(diff::Diff),
    Rollback(rollback::Rollback),
    Remove(remove::Remove),
    Owner(owner::Owner),
    #[command(subcommand)]
    Python(python::Python),
    #[command(subcommand)]
    Key(key::Key),
    Warm(warm::Warm),
    Profile(profile::Profile),
    Stats(stats::Stats),
    Gc(gc::Gc),
    Fsck(fsck::Fsck),
    #[command(subcommand)]
    Index(index::Index),
    Doctor(doctor::Doctor),
    Completions(completions::Completions),
    Man(completions::Man),
}

/// What every verb works with.
pub(crate) struct Context {
    settings: Settings,
    /// The config file that was named, for processes that this one starts.
    config: Option<std::path::PathBuf>,
    verbose: u8,
    /// True for a verb that publishes: only these read the key that signs.
    publishes: bool,
    out: Output,
}

impl Context {
    /// Opens the store that the settings name, with the keys in force.
    fn store(&self) -> Result<Store> {
        self.plain_store().and_then(|store| self.with_keys(store))
    }

    /// The same for who only looks, at whatever is there.
    fn plain_store(&self) -> Result<Store> {
        Store::open(&self.settings.store).map_err(|error| {
            match error.is_not_found() && self.settings.store_is_default {
                true => error.hint("the first `envfabric create` makes it; or name another with --store"),
                false => error,
            }
        })
    }

    /// Opens the store to build into; makes it when it is the default one of a user who has configured nothing.
    fn store_or_default(&self) -> Result<Store> {
        match self.settings.store_is_default {
            true => Store::init(&self.settings.store).and_then(|store| self.with_keys(store)),
            false => self.store(),
        }
    }

    /// What a build works with; without a trial of the result.
    fn builds<'a>(
        &self,
        store: &'a Store,
        index: &'a Index,
        uv: &'a Uv,
        progress: &'a dyn Progress,
    ) -> Result<build::Context<'a>> {
        let state = self.settings.state()?.to_path_buf();
        let scratch = self.settings.scratch.clone();
        Ok(build::Context { store, index, uv, state, scratch, progress, trial: None })
    }

    /// Drops this machine's index of `store`, if there is one.
    fn forget(&self, store: &Store) -> Result<()> {
        self.settings.state().map_or(Ok(()), |state| Index::forget(state, store))
    }

    /// This machine's index of `store`; for a service user without a home, one in memory.
    fn index(&self, store: &Store) -> Result<Index> {
        let opened = self.settings.state().and_then(|state| Index::open(state, store));
        opened.or_else(|error| {
            tracing::info!(error = error.chain(), "the index is kept in memory");
            Index::in_memory()
        })
    }
}

/// Runs the program with this process's arguments.
pub fn main() -> ExitCode {
    let command = Cli::command();
    let cli = match command.try_get_matches().and_then(|m| Cli::from_arg_matches(&m)) {
        Ok(cli) => cli,
        Err(error) => return told_by_clap(&error),
    };
    let out = Output::new(cli.global.json, cli.global.quiet);
    match run(cli, out) {
        Ok(code) => code,
        Err(error) if error.kind() == Kind::Os(libc::EPIPE) => ExitCode::SUCCESS,
        Err(error) => {
            out.error(&error);
            ExitCode::from(error.kind().exit_code())
        }
    }
}

/// `--help` and `--version`, or wrong usage.
fn told_by_clap(error: &clap::Error) -> ExitCode {
    if error.use_stderr() && std::env::args_os().any(|arg| arg == "--json") {
        let text = error.render().to_string();
        let mut parts = text.trim_start_matches("error: ").splitn(2, '\n');
        let told = Error::new(Kind::Usage, parts.next().unwrap_or_default());
        Output::new(true, false).error(&told.detail(parts.next().unwrap_or_default().trim()));
    } else {
        // A closed pipe is no failure.
        let _ = error.print();
    }
    ExitCode::from(if error.use_stderr() { 2 } else { 0 })
}

fn run(cli: Cli, out: Output) -> Result<ExitCode> {
    start_log(cli.global.verbose)?;
    match cli.verb {
        // These need no settings, and must work where the config file is broken.
        Verb::Completions(verb) => return verb.run(&mut Cli::command()),
        Verb::Man(verb) => return verb.run(Cli::command()),
        _ => {}
    }
    let store = cli.global.store.filter(|path| !path.as_os_str().is_empty());
    let settings = Settings::load(store, cli.global.config.as_deref(), cli.global.signing)?;
    let publishes = match &cli.verb {
        Verb::Create(_) | Verb::Rollback(_) | Verb::Remove(_) | Verb::Python(_) | Verb::Gc(_) | Verb::Fsck(_) => true,
        Verb::Owner(verb) => verb.publishes(),
        _ => false,
    };
    let context = Context { settings, config: cli.global.config, verbose: cli.global.verbose, publishes, out };
    match cli.verb {
        Verb::Init(verb) => verb.run(&context),
        Verb::Create(verb) => verb.run(&context),
        Verb::Mount(verb) => verb.run(&context),
        Verb::Umount(verb) => verb.run(&context),
        Verb::Run(verb) => verb.run(&context),
        Verb::Shell(verb) => verb.run(&context),
        Verb::List(verb) => verb.run(&context),
        Verb::Show(verb) => verb.run(&context),
        Verb::Versions(verb) => verb.run(&context),
        Verb::Diff(verb) => verb.run(&context),
        Verb::Rollback(verb) => verb.run(&context),
        Verb::Remove(verb) => verb.run(&context),
        Verb::Owner(verb) => verb.run(&context),
        Verb::Python(verb) => verb.run(&context),
        Verb::Key(verb) => verb.run(&context),
        Verb::Warm(verb) => verb.run(&context),
        Verb::Profile(verb) => verb.run(&context),
        Verb::Stats(verb) => verb.run(&context),
        Verb::Gc(verb) => verb.run(&context),
        Verb::Fsck(verb) => verb.run(&context),
        Verb::Index(verb) => verb.run(&context),
        Verb::Doctor(verb) => verb.run(&context),
        Verb::Completions(_) | Verb::Man(_) => Ok(ExitCode::SUCCESS),
    }
}

fn start_log(verbose: u8) -> Result<()> {
    let default = match verbose {
        0 => "warn",
        1 => "envfabric=info,warn",
        2 => "envfabric=debug,info",
        _ => "trace",
    };
    let filter = match std::env::var("ENVFABRIC_LOG") {
        Ok(text) => tracing_subscriber::EnvFilter::try_new(&text).map_err(|source| {
            Error::new(Kind::Usage, format!("ENVFABRIC_LOG={text:?} is not a log filter"))
                .hint("write for example ENVFABRIC_LOG=envfabric=debug")
                .with_source(source)
        })?,
        Err(_) => tracing_subscriber::EnvFilter::new(default),
    };
    let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    log.with_target(false).with_ansi(terminal).init();
    Ok(())
}
