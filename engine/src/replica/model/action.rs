//! The steps of the model, each with the function of the production code it stands for, and the rules that
//! can be left out.
//!
//! A step stands for everything between two points at which something else could come between and matter;
//! `mod.rs` says which steps of production are taken as one, and why nothing is lost by it.

/// One step. `p` is a primary, `f` who follows it, `n` any node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// A request starts, its intent is durable, its parts go out: `replica/client.rs::start`,
    /// `write.rs::launch`, `mark_missing` [R12].
    Write { p: u8 },
    /// The primary's own disk write completes: `write.rs::local_write_done`.
    WriteHere { p: u8 },
    /// A receiver marks the missing, sets its intent, writes, and its answer counts:
    /// `follow.rs::incoming`, `mark_for`, `incoming_done`, `write.rs::write_acked`.
    WriteThere { p: u8, f: u8 },
    /// A target writes what was answered without it: the same, `resync.rs::live_acked` [R21].
    LiveThere { p: u8, f: u8 },
    /// A primary that became alone under a write flushes before it answers: `flush.rs::pump_solo` [R14].
    FlushAlone { p: u8 },
    /// A flush of the ack set begins, the own disk flushes: `flush.rs::start_round`.
    Flush { p: u8 },
    /// A member flushes and its answer counts: `follow.rs::obey`, `flush.rs::flush_acked`.
    FlushThere { p: u8, f: u8 },
    /// The bitmaps of the missing become durable on `n`, the primary itself or a follower that heard what is
    /// stable: `flush.rs::clear_intents`, `intent.rs::clear_idle` [R5].
    Save { p: u8, n: u8 },
    /// The intent of `n` is cleared: the same, when all is saved.
    Clear { p: u8, n: u8 },
    /// A member is gone, or seems to be: `membership.rs::gone`, `pump_membership` up to the flush.
    Suspect { p: u8, f: u8 },
    /// The flush before the removal is done, the removal is proposed: `membership.rs::removal_flushed` [R9].
    ProposeRemoval { p: u8 },
    /// A member's session is up again: `peer.rs::session_up`, `follow.rs::confirm_takeover`,
    /// `takeover.rs::peer_reported`.
    Connect { p: u8, f: u8 },
    /// A replica outside the set is to be resynced and bears its mark: `resync.rs::begin_resync`,
    /// `add_target`, `join.rs::resync_asked`.
    BeginResync { p: u8, f: u8 },
    /// A block is compared and, if it differs, copied: `chunk.rs`.
    Copy { p: u8, f: u8 },
    /// The target gets the bitmaps, saves them and flushes: `resync.rs::flush_joiner`,
    /// `join.rs::join_flush_asked` [R4, R12].
    JoinFlush { p: u8, f: u8 },
    /// `resync.rs::target_to_propose`.
    ProposeJoin { p: u8, f: u8 },
    /// A proposal is committed: `control/apply/volumes.rs::propose`.
    Commit { n: u8 },
    /// A node learns the committed config: `config.rs::adopt_config`, `takeover.rs::become_primary`.
    Learn { n: u8 },
    /// A follower gets the primary's config on their session: `membership.rs::config_changed_as_primary`.
    Hear { p: u8, f: u8 },
    /// The controller promotes a member that is alive: `control/failover.rs::alive_member`,
    /// `control/apply/volumes.rs::promote`.
    Promote { n: u8 },
    /// The controller promotes the new run of a member after all restarted:
    /// `control/failover.rs::choose_restarted`, `control/apply/volumes.rs::promote_restarted` [R6].
    PromoteRestarted { n: u8 },
    /// A new primary flushes what it acknowledged: `takeover.rs::pump_takeover` [R9, R14].
    TakeoverFlush { p: u8 },
    /// A member confirms the reign and is made equal: `follow.rs::confirm_takeover`,
    /// `resync.rs::reconcile`, `chunk.rs` [R11].
    Reconcile { p: u8, f: u8 },
    /// A process dies; what the kernel has is on the disk, or in its cache.
    Kill { n: u8 },
    /// Power is lost; the block holds `content` afterwards.
    PowerLoss { n: u8, content: u8 },
    /// A process starts and registers: `mod.rs::Replica::new`, `control/apply/nodes.rs::register` [R3].
    Start { n: u8 },
}

/// A rule, or a part of one, that the model is run without. Each has to lead to a broken invariant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Without {
    /// Nothing is marked at start and at promotion.
    R3,
    /// A joiner is proposed before it enters the ack set.
    R4Entering,
    /// A joiner does not flush.
    R4Flush,
    /// A joiner is proposed while its set is not empty.
    R4Set,
    /// Intents are cleared before all of the ack set have flushed.
    R5Flush,
    /// Intents are cleared before the bitmaps of the missing are durable.
    R5Bitmaps,
    /// A replica outside the set clears intents.
    R5Outside,
    /// Whoever is up is promoted.
    R6,
    /// A read does not wait for the write of its block.
    R8,
    /// A removal is proposed without a flush.
    R9Flush,
    /// A promotion takes the old primary out of the set.
    R9Promotion,
    /// Another run than the named one counts.
    R10,
    /// A new primary serves without making the members equal.
    R11,
    /// A receiver does not mark the missing.
    R12Receiver,
    /// Members mark nothing for the one who is removed.
    R12Removal,
    /// A joiner does not get the bitmaps.
    R12Join,
    /// Alone, a write is acknowledged before it is stable.
    R14,
}
