//! Requests that are being answered, so that it is known which ones a worker that dies has left, and which of them may
//! have been the cause.
//!
//! A request is in the table from before its handler runs until after its reply was sent. When a worker dies, the
//! supervisor looks at what it has left ([`Requests::after_death`]); where the death may be the fault of a request, each
//! of these gets a strike, or, where the worker knew which it was (the thread that panicked, the one that was stuck), that
//! one alone. The kernel sends them again; one with [`STRIKES`] is answered with EIO.
//!
//! ```text
//! word 0   the kernel's number of the request; 0: free
//! word 1   the life that answers it << 16 | blamed << 15 | strikes << 8 | kind of request
//! word 2   inode
//! ```

use std::sync::atomic::{AtomicU64, Ordering};

/// The kernel sets it in the number of a request that it sends again (`FUSE_UNIQUE_RESEND`).
pub(in crate::mount) const RESENT: u64 = 1 << 63;
/// So many workers may die of a request.
pub(in crate::mount) const STRIKES: u64 = 3;
/// Words of a request.
pub(super) const WORDS: usize = 3;
const STRIKES_MASK: u64 = 0x7f;
const BLAMED: u64 = 1 << 15;
/// Places that a request may have, one beside the other.
const PLACES: usize = 32;
/// Spreads numbers that grow by two.
const SPREAD: u64 = 0x9E37_79B9_7F4A_7C15;

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::mount) enum Begun {
    /// It is answered; its place, if there was one.
    Followed(Option<usize>),
    /// It has ended too many workers: answer EIO.
    Poison,
}

/// What a worker has left.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::mount) struct Left {
    /// Requests that it was answering.
    pub(in crate::mount) requests: u64,
    /// Those of them that will be given up when they come again.
    pub(in crate::mount) poison: u64,
}

/// See the module.
#[derive(Debug, Clone, Copy)]
pub(in crate::mount) struct Requests<'a>(&'a [AtomicU64]);

impl<'a> Requests<'a> {
    /// A table of [`WORDS`] for each request.
    pub(super) fn new(words: &'a [AtomicU64]) -> Self {
        Requests(words)
    }

    fn place(&self, index: usize) -> &'a [AtomicU64] {
        &self.0[index * WORDS..(index + 1) * WORDS]
    }

    fn len(&self) -> usize {
        self.0.len() / WORDS
    }

    /// Notes that worker number `life` begins with request `unique`, of sort `op`, about inode `ino`.
    pub(in crate::mount) fn begin(&self, unique: u64, life: u64, op: u8, ino: u64) -> Begun {
        let (number, resent) = (unique & !RESENT, unique & RESENT != 0);
        let first = (number.wrapping_mul(SPREAD) >> 32) as usize;
        let places = || (0..PLACES).map(|step| (first + step) % self.len());
        let mut strikes = 0;
        // Only what comes again can be there already.
        if let Some(index) = places().find(|index| resent && self.place(*index)[0].load(Ordering::Acquire) == number) {
            let [_, state, ..] = self.place(index) else { return Begun::Followed(None) };
            strikes = state.load(Ordering::Acquire) >> 8 & STRIKES_MASK;
            if strikes >= STRIKES {
                self.end(index);
                return Begun::Poison;
            }
            self.fill(index, life, strikes, op, ino);
            return Begun::Followed(Some(index));
        }
        for index in places() {
            let claimed = self.place(index)[0].compare_exchange(0, number, Ordering::AcqRel, Ordering::Relaxed);
            if claimed.is_ok() {
                self.fill(index, life, strikes, op, ino);
                return Begun::Followed(Some(index));
            }
        }
        Begun::Followed(None)
    }

    fn fill(&self, index: usize, life: u64, strikes: u64, op: u8, ino: u64) {
        let [_, state, inode] = self.place(index) else { return };
        inode.store(ino, Ordering::Relaxed);
        state.store(life << 16 | strikes << 8 | u64::from(op), Ordering::Release);
    }

    /// Notes that the request at `index` is answered.
    pub(in crate::mount) fn end(&self, index: usize) {
        let [number, state, ..] = self.place(index) else { return };
        state.store(0, Ordering::Relaxed);
        number.store(0, Ordering::Release);
    }

    /// Notes that the request at `index` is what ends the worker.
    pub(in crate::mount) fn blame(&self, index: usize) {
        if let [_, state, _] = self.place(index) {
            state.fetch_or(BLAMED, Ordering::SeqCst);
        }
    }

    fn is_blamed(&self, index: usize, life: u64) -> bool {
        let [number, state, _] = self.place(index) else { return false };
        let of = state.load(Ordering::Acquire);
        number.load(Ordering::Acquire) != 0 && of >> 16 == life && of & BLAMED != 0
    }

    /// Looks at what worker `life`, which is dead, has left. `strike`: one of its requests may be the cause. `again`:
    /// the kernel sends them again; else it has ended them.
    pub(in crate::mount) fn after_death(&self, life: u64, strike: bool, again: bool) -> Left {
        let mut left = Left::default();
        let is_known = (0..self.len()).any(|index| self.is_blamed(index, life));
        for index in 0..self.len() {
            let [number, state, ..] = self.place(index) else { break };
            if number.load(Ordering::Acquire) == 0 {
                continue;
            }
            let of = state.load(Ordering::Acquire);
            if of >> 16 != life {
                // Left by a worker before it, and never sent again; or claimed, and no more. Not one that serves now.
                if of >> 16 < life {
                    self.end(index);
                }
                continue;
            }
            left.requests += 1;
            if !again {
                self.end(index);
            } else if strike && (!is_known || of & BLAMED != 0) {
                let strikes = ((of >> 8 & STRIKES_MASK) + 1).min(STRIKES_MASK);
                left.poison += u64::from(strikes >= STRIKES);
                state.store(of & !(BLAMED | STRIKES_MASK << 8) | strikes << 8, Ordering::Release);
            }
        }
        left
    }

    /// Requests that worker `life` is answering.
    pub(in crate::mount) fn of(&self, life: u64) -> u64 {
        let is_its = |index: &usize| {
            let place = self.place(*index);
            place[0].load(Ordering::Acquire) != 0 && place[1].load(Ordering::Acquire) >> 16 == life
        };
        (0..self.len()).filter(is_its).count() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(places: usize) -> Vec<AtomicU64> {
        (0..places * WORDS).map(|_| AtomicU64::new(0)).collect()
    }

    #[test]
    fn a_request_that_ends_worker_after_worker_is_given_up_and_no_other() {
        let words = words(64);
        let table = Requests::new(&words);
        let mut life = 1;
        let poison = 40;
        assert!(matches!(table.begin(poison, life, 1, 9), Begun::Followed(Some(_))));
        for strikes in 1..=STRIKES {
            // Something that is answered, and something that only this worker was at.
            let Begun::Followed(Some(done)) = table.begin(100 + life * 2, life, 1, 9) else { panic!() };
            table.end(done);
            table.begin(200 + life * 2, life, 1, 9);
            let left = table.after_death(life, true, true);
            assert_eq!(left, Left { requests: 2, poison: u64::from(strikes == STRIKES) });
            life += 1;
            let again = table.begin(poison | RESENT, life, 1, 9);
            assert_eq!(again == Begun::Poison, strikes == STRIKES, "{again:?}");
        }
        assert_eq!(table.of(life), 0);
        // What did not come again is forgotten with the next death.
        table.after_death(life, true, true);
        assert!(words.iter().step_by(WORDS).all(|number| number.load(Ordering::Relaxed) == 0));
    }

    #[test]
    fn where_it_is_known_which_request_it_was_the_others_have_no_part_in_it() {
        let words = words(64);
        let table = Requests::new(&words);
        table.begin(2, 1, 0, 0);
        let Begun::Followed(Some(mut culprit)) = table.begin(4, 1, 0, 0) else { panic!() };
        for life in 1..=STRIKES {
            table.blame(culprit);
            assert_eq!(table.after_death(life, true, true), Left { requests: 2, poison: u64::from(life == STRIKES) });
            assert!(matches!(table.begin(2 | RESENT, life + 1, 0, 0), Begun::Followed(Some(_))));
            match table.begin(4 | RESENT, life + 1, 0, 0) {
                Begun::Followed(place) => culprit = place.unwrap(),
                Begun::Poison => assert_eq!(life, STRIKES),
            }
        }
        assert_eq!(table.of(STRIKES + 1), 1);
    }

    #[test]
    fn a_death_that_somebody_ordered_is_held_against_nobody() {
        let words = words(64);
        let table = Requests::new(&words);
        table.begin(2, 1, 0, 0);
        for life in 1..50 {
            assert_eq!(table.after_death(life, false, true), Left { requests: 1, poison: 0 });
            assert!(matches!(table.begin(2 | RESENT, life + 1, 0, 0), Begun::Followed(Some(_))));
        }
        // Who serves beside one that ends keeps what it is at.
        table.begin(4, 51, 0, 0);
        // Where nothing is sent again, nothing is remembered.
        assert_eq!(table.after_death(50, true, false).requests, 1);
        assert_eq!(table.of(51), 1);
        table.after_death(51, true, false);
        assert!(words.iter().step_by(WORDS).all(|number| number.load(Ordering::Relaxed) == 0));
    }

    #[test]
    fn what_does_not_fit_is_answered_all_the_same() {
        let words = words(64);
        let table = Requests::new(&words);
        let begun: Vec<_> = (1..200u64).map(|n| table.begin(n * 2, 1, 0, 0)).collect();
        let followed = begun.iter().filter(|begun| matches!(begun, Begun::Followed(Some(_)))).count();
        assert!((32..=64).contains(&followed) && begun.iter().all(|begun| *begun != Begun::Poison));
        assert_eq!(table.of(1), followed as u64);
    }
}
