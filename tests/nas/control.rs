//! The control socket: a command a line, answered by a line of JSON.
//!
//! ```text
//! stats                             calls since `reset`, by kind; bytes; what is open, in flight, and hung
//! reads                             READ calls and bytes of each path since `reset`; the calls themselves, if recorded
//! record on|off                     record READ calls, at most 200,000 until `reset`
//! reset                             zero all of that
//! hang [PATTERN] [on CALL,...]      calls wait until `resume`
//! resume                            they go on, and no more hang
//! fail ERRNO [PATTERN] [COUNT] [on CALL,...]
//! full                              what needs room fails with ENOSPC
//! truncate [PATTERN] [COUNT]        a READ returns half of what it should
//! flip [PATTERN] [COUNT]            a READ comes back with bit 0 of its middle byte flipped
//! heal                              no more faults, no more hanging
//! set latency 5ms | set bandwidth 100MB/s
//! ```
//!
//! PATTERN is a part of a path relative to the backing directory, without spaces; none, or `*`: all paths. COUNT: only
//! for the next so many calls; else until `heal`. CALL: `LOOKUP`, `READ` and so on, as `stats` names them. Of several
//! rules for a call the oldest counts. An answer is `{"ok":true,...}` or `{"error":"..."}`. What a command sets holds
//! for every call that comes after its answer.
//!
//! The kernel asks again for a name or a page that failed, and opens again after ESTALE: for a COUNT that means what it
//! says, name the kind of call (`on OPEN`, `on WRITE`).
//! The kernel holds a directory while it looks a name up there: where one hangs, nothing new is made beside it.
//!
//! `truncate` and `flip` reach files that are opened while they are set: those are read past the kernel's page cache. A
//! file that was opened before is distorted only where the kernel has to ask, and a short answer becomes zeros there,
//! as for a file that became shorter; the next who opens it gets everything read anew. The same holds for `mmap`.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use nix::errno::Errno;
use serde_json::{Map, Value, json};

use crate::calls::Call;
use crate::faults::{Effect, Which};
use crate::pace;
use crate::server::Server;

/// Answers commands until the process ends.
pub(crate) fn listen(listener: UnixListener, server: Arc<Server>) -> std::io::Result<()> {
    let each = move |connection: UnixStream| {
        let server = server.clone();
        let serve = move || {
            // A client that goes away in the middle is nobody's trouble.
            let _ = converse(&connection, &server);
        };
        let _ = std::thread::Builder::new().name("control".into()).spawn(serve);
    };
    std::thread::Builder::new()
        .name("listener".into())
        .spawn(move || listener.incoming().map_while(Result::ok).for_each(each))
        .map(drop)
}

fn converse(connection: &UnixStream, server: &Arc<Server>) -> std::io::Result<()> {
    let mut out = connection;
    for line in BufReader::new(connection).lines() {
        let answer = match obey(&line?, server) {
            Ok(mut answer) => {
                answer.insert("ok".into(), true.into());
                Value::Object(answer)
            }
            Err(error) => json!({ "error": error }),
        };
        out.write_all(format!("{answer}\n").as_bytes())?;
    }
    Ok(())
}

fn obey(line: &str, server: &Arc<Server>) -> Result<Map<String, Value>, String> {
    let mut words: Vec<&str> = line.split_whitespace().collect();
    let calls = match words.iter().position(|word| *word == "on") {
        Some(at) if at > 0 && !words.starts_with(&["record"]) => kinds(&words.split_off(at))?,
        _ => vec![],
    };
    let which = |pattern: Option<&&str>| Which {
        pattern: pattern.filter(|pattern| **pattern != "*").map(|pattern| pattern.to_string()),
        calls: calls.clone(),
    };
    let fault = |effect: Effect, rest: &[&str]| {
        if rest.len() > 2 {
            return Err(format!("too many words: {line:?}"));
        }
        let count = rest.get(1).map(|count| count.parse().map_err(|_| format!("{count:?} is not a number of calls")));
        server.faults.set(effect, which(rest.first()), count.transpose()?);
        Ok(())
    };
    match words.as_slice() {
        ["stats"] => {
            let mut stats = server.counts.to_json();
            stats.insert("open_now".into(), server.backing.files.len().into());
            stats.insert("hung".into(), server.faults.hung().into());
            return Ok(stats);
        }
        ["reads"] => return Ok(server.reads.to_json()),
        ["reset"] => server.forget_counts(),
        ["record", "on"] => server.reads.record(true),
        ["record", "off"] => server.reads.record(false),
        ["hang"] => server.faults.hang(which(None)),
        ["hang", pattern] => server.faults.hang(which(Some(pattern))),
        ["resume"] => server.faults.resume(),
        ["heal"] => server.faults.heal(),
        ["full"] => fault(Effect::Full, &[])?,
        ["fail", errno, rest @ ..] => fault(Effect::Fail(errno_named(errno)?), rest)?,
        ["truncate", rest @ ..] => fault(Effect::Truncate, rest)?,
        ["flip", rest @ ..] => fault(Effect::Flip, rest)?,
        ["set", "latency", latency] => server.pace.set_latency(pace::duration(latency)?),
        ["set", "bandwidth", rate] => server.pace.set_rate(pace::rate(rate)?),
        _ => return Err(format!("not a command: {line:?}")),
    }
    Ok(Map::new())
}

/// The kinds of calls in `on READ,WRITE`.
fn kinds(words: &[&str]) -> Result<Vec<Call>, String> {
    let [_, names] = words else { return Err("after `on` come kinds of calls, like READ,WRITE".into()) };
    let of = |name| Call::from_name(name).ok_or_else(|| format!("{name:?} is not a kind of call"));
    names.split(',').map(of).collect()
}

fn errno_named(name: &str) -> Result<Errno, String> {
    let mut known = (1..134).map(Errno::from_raw).filter(|errno| *errno != Errno::UnknownErrno);
    known.find(|errno| format!("{errno:?}") == name).ok_or_else(|| format!("{name:?} is not an error number's name"))
}
