//! The node's own registration and the renewal of its lease.

use std::sync::Arc;
use std::time::Duration;

use crate::types::Member;

use super::super::command::ClusterOp;
use super::super::error::SubmitError;
use super::super::rpc::{Renewal, ReplyBody, RequestBody, newer_run};
use super::super::runtime::{sleep, timeout};
use super::inner::{Inner, lock};

/// Pause before another try after a renewal that failed.
const RETRY: Duration = Duration::from_millis(30);

/// Registers this run, then renews its lease as long as the node runs.
pub(super) async fn renew(inner: Arc<Inner>) {
    loop {
        let state = inner.current();
        let member = Member { node: inner.me, incarnation: inner.incarnation };
        let renew = renewal_pause(inner.options.renew, state.lease);
        let pause = if !state.nodes.contains_key(&inner.me) {
            // The founding, or being added, is still to come.
            RETRY
        } else if let Some(newest) = newer_run(&state, &inner.peers.me()) {
            inner.give_up(newest).await;
            return;
        } else if !state.is_newest(member) {
            if !register(&inner).await {
                return;
            }
            RETRY
        } else if renew_once(&inner, member).await {
            renew
        } else {
            RETRY
        };
        // Woken early when a replica's health or the leader changes.
        let _ = timeout(pause, inner.renew_now.notified()).await;
        if pause == RETRY {
            sleep(Duration::from_millis(1)).await;
        }
    }
}

/// How long after a renewal the next one leaves. The length of leases is the cluster's: however short it has
/// made them, one is renewed before it is over.
fn renewal_pause(wanted: Duration, lease: Duration) -> Duration {
    wanted.min(lease / 3)
}

/// Waits until a node of the cluster says that it knows a newer run of this store [R13].
pub(super) async fn watch_outdated(inner: Arc<Inner>) {
    let mut outdated = inner.peers.outdated();
    // The sender lives as long as this node; without it there is nothing left to do.
    let newest = outdated.wait_for(Option::is_some).await.ok().and_then(|newest| *newest);
    if let Some(newest) = newest {
        inner.give_up(newest).await;
    }
}

/// False if the cluster refuses this run for good.
async fn register(inner: &Arc<Inner>) -> bool {
    let mine = inner.options.founders.iter().find(|f| f.id == inner.me);
    let Some(mine) = mine else {
        inner.fail(format!("{} is not among the nodes that its config names", inner.me));
        return false;
    };
    let op = ClusterOp::Register {
        node: inner.me,
        incarnation: inner.incarnation,
        os_boot: inner.options.os_boot,
        addrs: mine.addrs.clone(),
    };
    match inner.submit(inner.next_request(), op).await {
        Ok(applied) => {
            tracing::info!(node = inner.me.0, %applied, "registered run {}", inner.incarnation);
            true
        }
        Err(SubmitError::Refused(why)) => {
            inner.fail(why);
            false
        }
        Err(e) => {
            tracing::debug!(node = inner.me.0, %e, "could not register yet");
            true
        }
    }
}

async fn renew_once(inner: &Arc<Inner>, member: Member) -> bool {
    let leader = *inner.leader.borrow();
    let Some(leader) = leader else { return false };
    let volumes = {
        let reports = lock(&inner.reports);
        reports.iter().map(|(id, said)| (*id, said.health.clone(), said.report)).collect()
    };
    let nonce = inner.next_request().number;
    // Read before the first byte leaves: the lease counts from here [R1].
    let sent = inner.env.now();
    lock(&inner.lease).on_send(nonce, sent);
    let renewal = Renewal { member, nonce, volumes };
    let reply = if leader == inner.me {
        Ok(inner.grant(renewal).await)
    } else {
        // Longer than a renewal's pause is of no use: the next one says more.
        inner.peers.call(leader, RequestBody::Renew(renewal), inner.options.renew).await
    };
    match reply {
        Ok(ReplyBody::Grant(grant)) => {
            let applied = inner.current().applied;
            let counted = lock(&inner.lease).on_grant(&grant, applied);
            publish(inner);
            counted
        }
        Ok(other) => {
            tracing::debug!(node = inner.me.0, leader = leader.0, ?other, "no lease");
            false
        }
        Err(e) => {
            tracing::debug!(node = inner.me.0, leader = leader.0, %e, "no lease");
            false
        }
    }
}

/// Grants wait for their index; this lets them count as it is applied.
pub(super) async fn follow_applied(inner: Arc<Inner>) {
    let mut state = inner.state.clone();
    loop {
        let applied = state.borrow_and_update().applied;
        lock(&inner.lease).on_applied(applied);
        publish(&inner);
        if state.changed().await.is_err() {
            return;
        }
    }
}

fn publish(inner: &Inner) {
    // Under the lease's lock, so that an older snapshot never replaces a newer one.
    let lease = lock(&inner.lease);
    inner.lease_out.send_if_modified(|out| {
        let changed = out != lease.snapshot();
        if changed {
            out.clone_from(lease.snapshot());
        }
        changed
    });
}

#[cfg(test)]
mod tests {
    use super::super::super::state::LEASE_MIN;
    use super::*;

    #[test]
    fn r1_a_short_lease_is_renewed_before_it_is_over() {
        let wanted = Duration::from_millis(400);
        assert_eq!(renewal_pause(wanted, Duration::from_millis(1500)), wanted);
        assert!(renewal_pause(wanted, LEASE_MIN) * 2 < LEASE_MIN);
    }
}
