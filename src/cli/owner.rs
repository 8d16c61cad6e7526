//! `envfabric owner`

use std::process::ExitCode;

use nix::unistd::{Gid, Group, Uid, User};

use super::Context;
use super::output::time;
use super::spec::workflow;
use crate::environment::{Mode, Owner as Whose};
use crate::error::{Error, Kind, Result};
use crate::store::Ownership;

/// Show or set who may look at a workflow
///
/// Mounts give the directories of the workflow this user, group and mode, and the kernel holds everybody to them; root
/// may look at everything. Users and groups are kept by number, so they must have the same numbers on every machine.
/// What mounts show follows within about a second.
#[derive(Debug, clap::Args)]
pub(crate) struct Owner {
    /// WORKFLOW, which need not have environments yet
    #[arg(value_name = "WF", value_parser = workflow)]
    workflow: String,
    /// Whose it is: a name that this machine knows, or a number
    #[arg(long, value_name = "USER")]
    uid: Option<String>,
    /// Its group: a name or a number [default: as it is, else the user's own]
    #[arg(long, value_name = "GROUP")]
    gid: Option<String>,
    /// Permissions, in octal digits [default: as they are, else 0750 with --gid and 0700 without]
    #[arg(long, value_name = "MODE", value_parser = mode)]
    mode: Option<Mode>,
    /// Let everybody look at it who is let into the mount
    #[arg(long, conflicts_with_all = ["uid", "gid", "mode"])]
    nobody: bool,
}

fn mode(text: &str) -> std::result::Result<Mode, String> {
    text.parse().map_err(|error: Error| error.to_string())
}

impl Owner {
    /// True when something is to be written.
    pub(super) fn publishes(&self) -> bool {
        self.nobody || self.uid.is_some() || self.gid.is_some() || self.mode.is_some()
    }

    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        let store = context.store()?;
        let workflow = &self.workflow;
        let ownership = match self.publishes() {
            false => store.owner(workflow)?,
            true => {
                // One that cannot be read is written over, and has nothing to keep.
                let now = store.owner(workflow).ok().flatten().and_then(|ownership| ownership.owner);
                let set = store.set_owner(workflow, if self.nobody { None } else { Some(self.wanted(now)?) })?;
                if store.nodes(workflow)?.is_empty() {
                    context.out.say(format_args!("there is no environment in {workflow} yet"));
                }
                Some(set)
            }
        };
        let told = serde_json::json!({
            "workflow": workflow,
            "owner": ownership.as_ref().and_then(|ownership| ownership.owner),
            "sequence": ownership.as_ref().map(|ownership| ownership.sequence),
            "at": ownership.as_ref().map(|ownership| ownership.at),
            "by": ownership.as_ref().map(|ownership| &ownership.by),
        });
        context.out.result(&told, |w| writeln!(w, "{workflow} is for {}", sentence(ownership.as_ref())))?;
        Ok(ExitCode::SUCCESS)
    }

    /// What is asked for, where it is `now` so.
    fn wanted(&self, now: Option<Whose>) -> Result<Whose> {
        let user = self.uid.as_deref().map(user).transpose()?;
        let uid = user.as_ref().map(|(uid, _)| *uid).or(now.map(|now| now.uid)).ok_or_else(|| {
            Error::new(Kind::Usage, format!("{} has no owner yet, and none is named", self.workflow))
                .hint("name a user: --uid USER")
        })?;
        let own = user.and_then(|(_, group)| group);
        let gid = match (&self.gid, now) {
            (Some(named), _) => group(named)?,
            (None, Some(now)) => now.gid,
            (None, None) => own.ok_or_else(|| {
                Error::new(Kind::Usage, format!("this machine does not know the group of user {uid}"))
                    .hint("name one: --gid GROUP")
            })?,
        };
        let usual = if self.gid.is_some() { Mode::GROUP } else { Mode::PRIVATE };
        Ok(Whose { uid, gid, mode: self.mode.or(now.map(|now| now.mode)).unwrap_or(usual) })
    }
}

/// A user's number, and its group's where that is known here.
fn user(named: &str) -> Result<(u32, Option<u32>)> {
    let found = match named.parse::<u32>() {
        Ok(number) => match User::from_uid(Uid::from_raw(number)) {
            Ok(Some(user)) => Some(user),
            _ => return Ok((number, None)),
        },
        Err(_) => User::from_name(named).ok().flatten(),
    };
    let found = found.ok_or_else(|| unknown("user", named))?;
    Ok((found.uid.as_raw(), Some(found.gid.as_raw())))
}

fn group(named: &str) -> Result<u32> {
    match named.parse::<u32>() {
        Ok(number) => Ok(number),
        Err(_) => {
            let found = Group::from_name(named).ok().flatten();
            found.map(|group| group.gid.as_raw()).ok_or_else(|| unknown("group", named))
        }
    }
}

fn unknown(what: &str, named: &str) -> Error {
    Error::new(Kind::Usage, format!("this machine knows no {what} {named:?}"))
        .hint("name it by number, the one that it has on the machines that mount the store")
}

/// Who may look, for people.
pub(super) fn sentence(ownership: Option<&Ownership>) -> String {
    let Some(ownership) = ownership else { return "everybody who is let into the mount".into() };
    let since = format!("since {}", time(ownership.at));
    let Some(Whose { uid, gid, mode }) = ownership.owner else {
        return format!("everybody who is let into the mount, {since}");
    };
    let name = |found: Option<String>| found.map(|name| format!(" ({name})")).unwrap_or_default();
    let user = name(User::from_uid(Uid::from_raw(uid)).ok().flatten().map(|user| user.name));
    let group = name(Group::from_gid(Gid::from_raw(gid)).ok().flatten().map(|group| group.name));
    format!("user {uid}{user}, group {gid}{group}, mode {mode}, {since}")
}
