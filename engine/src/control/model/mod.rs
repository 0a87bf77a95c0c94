//! A model of the control plane that a machine checks to its end: config, leases, incarnations and restarts of
//! Raft for two data nodes and a witness, with renewals that are lost, late and answered by leaders of the past.
//! Checked in every state: invariants 1, 2, 7 and 8 of the design; and that the volume serves again, within a
//! bounded time, from every state in which the last fault was used (10).
//!
//! What decides is the code of production: `apply`, `LeaseTable`, `NodeLease`, `Failover`. Of the asynchronous glue
//! around it (`control/node`) `step.rs` repeats the order and names the function; of Raft there is what it
//! promises: one log, a newest leader, entries of it that may be lost with it. The data path is who of the two
//! holds every acknowledged write; `replica/model` is the model of that.
//!
//! | file | concern |
//! |---|---|
//! | `state` | what is where |
//! | `step` | the steps, what each does, and what can be left out |
//! | `fair` | the schedule in which nothing fails any more |
//! | `tests` | the bounds, run by stateright |
//!
//! Time: the clock stands still and everything gets older, in ticks of one lease; what is over is forgotten. So time
//! has no bound, and neither have lost messages. Bounded are crashes, elections against a live leader, removals of
//! a live member and promotions.
//!
//! What is taken as one step, and why no run is lost by it:
//! - *Entries that change no volume* are committed and applied at once: late is the same as written late.
//! - *A renewal of one that is not primary*, as far as it knows: it only tells the leader who is alive.
//! - *Confirming and granting*, when no other leader can come any more.
//! - A renewal whose lease would be over when it is answered is lost.
//!
//! Not here: moves, forces, demotes, sick disks, clocks that drift, a take-over that takes time (who has role and
//! lease counts as serving at once), changes of the lease's length; `control/lease/tests.rs`, `control/node/tests.rs`
//! and the simulator have them.

mod fair;
mod state;
mod step;
mod tests;
