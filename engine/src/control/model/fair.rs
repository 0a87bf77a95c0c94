//! A fair schedule: everything that can happen does, in turn, and nothing fails any more. From every state in
//! which the last fault was used, it has to lead to a volume that serves (invariant 10).

use super::state::{DATA, NODES, Stage, State};
use super::step::{Action, Bounds};

/// Ticks, of half a lease each, within which the volume serves: a lease that runs out, the wait of a new leader,
/// the wait for members that restarted, a removal and two promotions after each other.
pub(super) const TICKS_MAX: usize = 16;

impl Bounds {
    /// After how many ticks the volume serves; `None` if it does not.
    pub(super) fn serves_after(&self, state: &State) -> Option<usize> {
        let mut s = state.clone();
        s.promotions_left = u8::MAX;
        for ticks in 0..TICKS_MAX {
            self.round(&mut s);
            if (0..DATA).any(|n| s.serves(n)) {
                return Some(ticks);
            }
            self.take(&mut s, Action::Tick);
        }
        None
    }

    fn take(&self, s: &mut State, action: Action) {
        if let Some(next) = self.next(s, action) {
            *s = next;
        }
    }

    /// All that can be done without time passing.
    fn round(&self, s: &mut State) {
        for n in 0..NODES {
            self.take(s, Action::Start { n });
            self.take(s, Action::StepDown { n });
            self.take(s, Action::LeadAgain { n });
        }
        if s.leader().is_none() {
            let kept = s.tail.len();
            self.take(s, Action::Elect { n: NODES - 1, kept });
        }
        self.settle(s);
        for n in 0..DATA {
            self.take(s, Action::Register { n });
            self.take(s, Action::ProposeAgain { n });
        }
        self.settle(s);
        // Older renewals are lost, new ones go through.
        s.renewals.clear();
        for n in 0..DATA {
            self.take(s, Action::Send { n });
            while let Some(m) = s.renewals.iter().position(|r| r.n == n) {
                let action = match s.renewals[m].stage {
                    Stage::Sent => Action::Confirm { m },
                    Stage::Confirmed { .. } => Action::Grant { m },
                    Stage::Granted(_) => Action::Receive { m },
                };
                match self.next(s, action) {
                    Some(next) => *s = next,
                    None => drop(s.renewals.remove(m)),
                }
            }
        }
        for n in 0..NODES {
            self.take(s, Action::Decide { n });
        }
        for n in 0..DATA {
            self.take(s, Action::ProposeRemoval { n });
        }
        self.settle(s);
    }

    /// Commits and applies everything.
    fn settle(&self, s: &mut State) {
        while let Some(next) = self.next(s, Action::Commit) {
            *s = next;
        }
        for n in 0..NODES {
            while let Some(next) = self.next(s, Action::Apply { n }) {
                *s = next;
            }
        }
    }
}
