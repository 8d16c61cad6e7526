//! Which versions stay: a function of what is known of them.

use std::time::Duration;

/// What stays besides what is current, in use, or younger than the grace time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Keep {
    /// Every version of every environment that was not removed.
    #[default]
    All,
    /// The newest so many of each environment, the current one counted.
    Newest(usize),
    /// What was published, or current, within this time.
    For(Duration),
}

/// What is known of a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) number: u64,
    /// Since it was published.
    pub(super) age: Duration,
    /// Since it stopped being current, if it ever was and that is known.
    pub(super) idle: Option<Duration>,
    /// Somebody has a lease on it.
    pub(super) leased: bool,
}

/// What is known of which version of an environment is current.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Now {
    /// It cannot be read, so nothing is known.
    Unknown,
    /// This one, by a pointer or because it is the first.
    Current(u64),
    /// The environment was removed so long ago.
    Removed(Duration),
}

/// The numbers among `versions` that may be taken out of use.
pub(super) fn retired(versions: &[Known], now: Now, keep: Keep, grace: Duration) -> Vec<u64> {
    let mut numbers: Vec<u64> = versions.iter().map(|version| version.number).collect();
    numbers.sort_unstable_by(|a, b| b.cmp(a));
    let is_kept = |version: &Known| {
        if version.leased || version.age < grace {
            return true;
        }
        match (now, keep) {
            (Now::Unknown, _) => true,
            (Now::Removed(since), _) => since < grace,
            (Now::Current(current), _) if version.number == current => true,
            (Now::Current(_), Keep::All) => true,
            (Now::Current(current), Keep::Newest(count)) => {
                // The current one counts, wherever it is.
                let others = numbers.iter().filter(|number| **number != current).take(count.saturating_sub(1));
                others.into_iter().any(|number| *number == version.number)
            }
            (Now::Current(_), Keep::For(time)) => version.idle.map_or(version.age, |idle| idle.min(version.age)) < time,
        }
    };
    let mut retired: Vec<u64> =
        versions.iter().filter(|version| !is_kept(version)).map(|version| version.number).collect();
    retired.sort_unstable();
    retired
}

/// A pointer, for [`superseded`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PointerFacts {
    pub(super) sequence: u64,
    /// Since it was written.
    pub(super) age: Duration,
    /// What it points to; none for nothing, or where it cannot be read.
    pub(super) version: Option<u64>,
}

/// Sequence numbers among `pointers` that nobody needs: readers that know an older one have seen a newer one for longer
/// than the grace time, and they tell neither when a version that is there was current last nor which one `rollback`
/// brings back.
pub(super) fn superseded(pointers: &[PointerFacts], versions: &[u64], grace: Duration) -> Vec<u64> {
    let mut sorted = pointers.to_vec();
    sorted.sort_unstable_by_key(|pointer| pointer.sequence);
    let last_to = |version: u64| sorted.iter().rfind(|p| p.version == Some(version)).map(|p| p.sequence);
    let last_to_any = sorted.iter().rfind(|p| p.version.is_some()).map(|p| p.sequence);
    let is_needed = |pointer: &PointerFacts| {
        let tells_last = pointer
            .version
            .is_some_and(|version| versions.contains(&version) && last_to(version) == Some(pointer.sequence));
        tells_last || last_to_any == Some(pointer.sequence)
    };
    // The one behind each is what readers have seen instead.
    let pairs = sorted.windows(2);
    pairs.filter(|pair| pair[1].age >= grace && !is_needed(&pair[0])).map(|pair| pair[0].sequence).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn version(number: u64, hours: u32) -> Known {
        Known { number, age: HOUR * hours, idle: None, leased: false }
    }

    #[test]
    fn what_is_current_leased_young_or_unknown_stays() {
        let all: Vec<Known> = (1..=6).map(|n| version(n, 60 - n as u32 * 10 + 1)).collect();
        let retired = |now, keep| super::retired(&all, now, keep, HOUR * 5);
        assert!(retired(Now::Current(6), Keep::All).is_empty());
        assert_eq!(retired(Now::Current(6), Keep::Newest(2)), [1, 2, 3, 4]);
        assert_eq!(retired(Now::Current(2), Keep::Newest(2)), [1, 3, 4, 5], "6 is young, too");
        assert_eq!(retired(Now::Current(2), Keep::Newest(1)), [1, 3, 4, 5], "6 is younger than the grace time");
        assert_eq!(retired(Now::Current(6), Keep::For(HOUR * 25)), [1, 2, 3]);
        assert!(retired(Now::Unknown, Keep::Newest(1)).is_empty());
        assert!(retired(Now::Removed(HOUR * 4), Keep::Newest(1)).is_empty());
        assert_eq!(retired(Now::Removed(HOUR * 6), Keep::All), [1, 2, 3, 4, 5]);
        let mut leased = all.clone();
        leased[0].leased = true;
        leased[1].idle = Some(HOUR);
        assert_eq!(super::retired(&leased, Now::Removed(HOUR * 6), Keep::All, HOUR), [2, 3, 4, 5, 6]);
        assert_eq!(super::retired(&leased, Now::Current(6), Keep::For(HOUR * 2), HOUR), [3, 4, 5]);
    }

    #[test]
    fn pointers_go_only_when_a_newer_one_was_there_for_the_grace_time() {
        let pointer = |sequence, hours: u32, version| PointerFacts { sequence, age: HOUR * hours, version };
        let all = [
            pointer(2, 50, Some(2)),
            pointer(3, 40, Some(1)),
            pointer(4, 30, Some(2)),
            pointer(5, 20, Some(9)),
            pointer(6, 10, None),
            pointer(7, 1, None),
            pointer(8, 0, None),
        ];
        assert_eq!(superseded(&all, &[1, 2], HOUR * 5), [2]);
        assert_eq!(superseded(&all, &[], HOUR * 5), [2, 3, 4], "5 says what was current last");
        assert_eq!(superseded(&all, &[], HOUR), [2, 3, 4, 6]);
        assert!(superseded(&all[..1], &[], Duration::ZERO).is_empty(), "the last one stays");
        assert!(superseded(&[], &[], Duration::ZERO).is_empty());
    }
}
