//! Shows a build's progress: bars on a terminal, a line per event otherwise.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::interrupt;
use super::output::Output;
use crate::build::{Event, PackageState, Progress, Step};
use crate::error::Result;

/// Progress on standard error.
pub(crate) struct Shown {
    mode: Mode,
    state: Mutex<State>,
}

enum Mode {
    Quiet,
    Lines,
    Bars(MultiProgress),
}

struct State {
    begun: Instant,
    /// The line of the step, with a bar where something can be counted.
    step: Option<ProgressBar>,
    /// A line for each package that uv is busy with.
    packages: BTreeMap<String, ProgressBar>,
    /// Layers to store, and stored.
    missing: usize,
    stored: usize,
    told_compiled: usize,
}

impl Shown {
    fn new(out: &Output) -> Shown {
        let mode = match (out.quiet, out.terminal) {
            (true, _) => Mode::Quiet,
            (false, true) => Mode::Bars(MultiProgress::new()),
            (false, false) => Mode::Lines,
        };
        let state = State {
            begun: Instant::now(),
            step: None,
            packages: BTreeMap::new(),
            missing: 0,
            stored: 0,
            told_compiled: 0,
        };
        Shown { mode, state: Mutex::new(state) }
    }

    /// Shown progress of work that Ctrl-C ends: the bars are taken away first.
    pub(crate) fn interruptible(out: &Output) -> Result<Arc<Shown>> {
        let shown = Arc::new(Shown::new(out));
        let bars = shown.clone();
        interrupt::exit_on_signal(move || bars.clear())?;
        Ok(shown)
    }

    /// Takes all bars away.
    pub(crate) fn clear(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for bar in std::mem::take(&mut state.packages).into_values().chain(state.step.take()) {
            bar.finish_and_clear();
        }
    }
}

impl Progress for Shown {
    fn event(&self, event: &Event<'_>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match &self.mode {
            Mode::Quiet => {}
            Mode::Lines => lines(&mut state, event),
            Mode::Bars(all) => bars(&mut state, all, event),
        }
    }
}

fn step_text(step: Step) -> &'static str {
    match step {
        Step::Waiting => "waiting for another build of the same",
        Step::FindingInterpreter => "finding an interpreter",
        Step::AddingInterpreter => "adding the interpreter to the store",
        Step::Resolving => "resolving",
        Step::Installing => "installing",
        Step::Compiling => "compiling bytecode",
        Step::Storing => "storing layers",
        Step::Validating => "validating",
        Step::Publishing => "publishing",
    }
}

fn lines(state: &mut State, event: &Event<'_>) {
    let seconds = state.begun.elapsed().as_secs_f64();
    let say = |text: std::fmt::Arguments<'_>| {
        let _ = writeln!(std::io::stderr(), "[{seconds:6.1} s] {text}");
    };
    match *event {
        Event::Step(step) => {
            state.told_compiled = 0;
            say(format_args!("{}", step_text(step)));
        }
        Event::Planned { packages, known } => {
            state.missing = packages - known;
            say(format_args!("{packages} packages, {known} with layers in the store"));
        }
        Event::Package { name, state: package } => match package {
            PackageState::Downloading(size) => say(format_args!("downloading {name} ({size})")),
            PackageState::Downloaded => say(format_args!("downloaded {name}")),
            PackageState::Building => say(format_args!("building {name}")),
            PackageState::Built => say(format_args!("built {name}")),
            PackageState::Installed => {}
            PackageState::Stored => {
                state.stored += 1;
                say(format_args!("stored {name} ({}/{})", state.stored, state.missing));
            }
        },
        // A line for each tenth is enough to see that it goes on.
        Event::Compiled { done, total } => {
            let tenth = (done * 10).checked_div(total).unwrap_or(10);
            if tenth > state.told_compiled {
                state.told_compiled = tenth;
                say(format_args!("compiled {done}/{total} files"));
            }
        }
        Event::Note(text) => say(format_args!("{text}")),
    }
}

fn bars(state: &mut State, all: &MultiProgress, event: &Event<'_>) {
    match *event {
        Event::Step(step) => {
            for bar in std::mem::take(&mut state.packages).into_values() {
                bar.finish_and_clear();
            }
            if let Some(old) = state.step.take() {
                old.finish_and_clear();
            }
            let bar = all.insert(0, ProgressBar::new_spinner());
            style(&bar, "{spinner:.green} {msg}");
            bar.set_message(step_text(step));
            bar.enable_steady_tick(Duration::from_millis(100));
            if step == Step::Storing {
                count(&bar, state.stored, state.missing);
            }
            state.step = Some(bar);
        }
        Event::Planned { packages, known } => {
            state.missing = packages - known;
            let _ = all.println(format!("{packages} packages, {known} with layers in the store"));
        }
        Event::Package { name, state: package } => match package {
            PackageState::Downloading(size) => busy(state, all, name, format!("downloading {name} ({size})")),
            PackageState::Building => busy(state, all, name, format!("building {name}")),
            PackageState::Downloaded | PackageState::Built => {
                if let Some(bar) = state.packages.remove(name) {
                    bar.finish_and_clear();
                }
            }
            PackageState::Installed => {}
            PackageState::Stored => {
                state.stored += 1;
                if let Some(bar) = &state.step {
                    count(bar, state.stored, state.missing);
                    bar.set_message(format!("storing layers: {name}"));
                }
            }
        },
        Event::Compiled { done, total } => {
            if let Some(bar) = &state.step {
                count(bar, done, total);
            }
        }
        Event::Note(text) => {
            let _ = all.println(text);
        }
    }
}

fn busy(state: &mut State, all: &MultiProgress, name: &str, text: String) {
    let bar = all.add(ProgressBar::new_spinner());
    style(&bar, "    {wide_msg}");
    bar.set_message(text);
    bar.tick();
    if let Some(old) = state.packages.insert(name.to_string(), bar) {
        old.finish_and_clear();
    }
}

fn count(bar: &ProgressBar, done: usize, total: usize) {
    if total == 0 {
        return;
    }
    if bar.length() != Some(total as u64) {
        bar.set_length(total as u64);
        style(bar, "{spinner:.green} [{bar:24.green}] {pos}/{len} {wide_msg}");
    }
    bar.set_position(done as u64);
}

fn style(bar: &ProgressBar, template: &str) {
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
}
