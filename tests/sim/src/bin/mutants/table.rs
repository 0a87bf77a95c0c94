//! The table: each mutation, the unit tests that have to fail under it, and what else has to find it.
//!
//! An aim makes faults certain that a schedule needs, so that it does not take thousands of seeds until they
//! come together by chance; everything else about a run is drawn from the seed as ever.

use std::fmt;

use blkrepl_engine::mutation::Mutation;
use blkrepl_sim::{FaultKind, FaultSet, Options};

/// How the simulator is aimed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Aim {
    /// Kinds of faults that strike for certain.
    always: &'static [FaultKind],
    /// Kinds that may strike; none named: all.
    faults: &'static [FaultKind],
    nodes: Option<u8>,
}

impl Aim {
    /// Runs as CI has them.
    const ANY: Self = Self { always: &[], faults: &[], nodes: None };

    const fn at(always: &'static [FaultKind]) -> Self {
        Self { always, ..Self::ANY }
    }

    pub(crate) fn options(self) -> Options {
        let faults = if self.faults.is_empty() { FaultSet::ALL } else { FaultSet::of(self.faults) };
        Options { always: FaultSet::of(self.always), faults, data_nodes: self.nodes, ..Options::default() }
    }
}

/// What has to find a mutation, besides its named tests.
#[derive(Clone, Copy, Debug)]
pub(crate) enum By {
    /// The simulator, aimed like this.
    Seeds(Aim),
    /// The simulator of the control plane alone, with production's Raft.
    Control,
    /// The model check of the data path, because the schedule is too rare for seeds: why.
    Model(&'static str),
    /// Nothing else, because the rule lives outside of what the simulator runs: where.
    Test(&'static str),
}

impl fmt::Display for By {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Seeds(_) | Self::Control => f.write_str("seeds"),
            Self::Model(why) => write!(f, "by model b: {why}"),
            Self::Test(place) => write!(f, "by test: {place}"),
        }
    }
}

/// One mutation.
pub(crate) struct Row {
    pub(crate) mutation: Mutation,
    pub(crate) by: By,
    /// Unit tests of the engine that fail under it; the scenarios are those of `replica::testing`.
    pub(crate) tests: &'static [&'static str],
}

macro_rules! table {
    ($($mutation:ident: $by:expr, [$($test:literal),+];)+) => {
        /// Every mutation.
        pub(crate) const TABLE: &[Row] = &[$(
            Row { mutation: Mutation::$mutation, by: $by, tests: &[$($test),+] },
        )+];
    };
}

use By::{Control, Model, Seeds, Test};
use FaultKind as K;

#[rustfmt::skip] // One mutation after the other, with the tests below it, is easier to read.
table! {
    R1: Seeds(Aim::ANY), [
        "control::lease::tests::r1_the_leader_counts_longer_than_the_node",
        "control::lease::tests::r1_an_excluded_volume_runs_out_although_its_node_renews"];
    R2: Seeds(Aim::at(&[K::Crash])), [
        "control::apply::tests::r2_a_proposal_of_a_run_that_was_replaced_is_refused",
        "scenarios_rules::r2_another_run_of_the_primary_is_not_obeyed"];
    R3: Seeds(Aim::ANY), [
        "scenarios::r3_intent_regions_are_marked_for_all_others_at_start_and_at_promotion",
        "scenarios_rules::r3_a_promoted_replica_marks_its_intent_regions_for_all_others"];
    R4: Seeds(Aim::ANY), [
        "scenarios::r4_r12_a_joiner_is_in_the_ack_set_before_its_join_is_proposed",
        "scenarios_rules::r4_a_joiner_is_waited_for_from_before_its_flush"];
    R5: Seeds(Aim::ANY), [
        "scenarios::r5_intents_go_only_when_all_have_flushed_and_the_bitmaps_are_durable",
        "scenarios_rules::r5_an_intent_goes_only_after_the_bitmaps_of_the_missing_are_durable"];
    R6: Seeds(Aim::at(&[K::PowerLossAll, K::DiskLoss])), [
        "control::failover_tests::r16_a_doubtful_superblock_counts_only_if_it_matches_the_config",
        "control::failover_tests::r6_r16_what_is_inconsistent_or_of_another_run_is_not_eligible"];
    R7: Seeds(Aim::ANY), [
        "scenarios_rules::r7_a_target_begins_no_write_before_an_older_one_of_the_block_has_ended",
        "scenarios_rules::r7_nothing_is_confirmed_while_the_kernel_has_a_write_of_an_older_reign",
        "reactor::tests::open::r7_a_second_opener_is_locked_out_until_the_first_is_gone"];
    R8: Seeds(Aim::ANY), [
        "scenarios::r8_a_read_waits_for_the_overlapping_write_until_all_have_committed_it"];
    R9: Seeds(Aim::at(&[K::PowerLoss, K::Isolate])), [
        "scenarios_rules::r9_no_removal_is_proposed_before_the_own_flush",
        "scenarios_rules::r9_a_new_primary_flushes_what_it_acknowledged_as_a_secondary_before_it_serves"];
    R10: Model("a restarted member's flush has to count and it has to be elected, all before its removal commits"), [
        "scenarios::r2_r10_a_restarted_member_counts_for_nothing_until_it_has_joined_again"];
    R11: Seeds(Aim::ANY), [
        "scenarios::r11_a_new_primary_serves_nothing_before_the_other_members_follow_it",
        "scenarios_rules::r11_what_only_another_member_has_is_made_equal_too"];
    R12: Seeds(Aim::ANY), [
        "scenarios::r12_secondaries_mark_the_removed_one_and_a_joiner_gets_the_bitmaps",
        "scenarios_rules::r12_at_a_removal_every_member_marks_its_intent_regions",
        "scenarios_rules::r12_who_knows_a_newer_config_than_the_sender_marks_by_it"];
    R13: Control, [
        "control::rpc::tests::r13_another_store_or_an_older_run_under_a_known_id_is_refused",
        "control::rpc::tests::r13_a_removed_node_is_refused_and_one_not_known_yet_is_not",
        "control::store::tests::r13_a_store_that_was_rolled_back_damaged_or_mixed_up_is_refused"];
    R14: Seeds(Aim::ANY), [
        "scenarios_rules::r14_what_was_sent_to_two_and_committed_by_one_is_flushed_first",
        "scenarios_rules::r14_while_a_removal_is_undecided_an_acknowledged_write_is_stable"];
    R15: Seeds(Aim::at(&[K::DataReplaced])), [
        "scenarios_faults::r15_a_replaced_data_object_is_copied_whole",
        "reactor::tests::open::r15_another_data_file_under_old_metadata_means_that_everything_is_copied"];
    R16: Seeds(Aim::ANY), [
        "scenarios_rules::r16_neither_an_answer_nor_a_clear_comes_before_both_copies_of_the_superblock",
        "scenarios_rules::r16_a_follower_answers_nothing_under_a_config_that_its_superblock_does_not_hold"];
    R17: Seeds(Aim::at(&[K::Force])), [
        "control::apply::tests::r17_a_force_forks_the_lineage_and_begins_a_reign"];
    R18: Seeds(Aim::at(&[K::Move])), [
        "scenarios::r18_a_move_stops_drains_flushes_and_only_then_proposes",
        "scenarios::r18_a_move_of_unknown_fate_is_voided_before_the_old_primary_serves_again"];
    R19: Test("the control network between two clusters, which the simulator has not"), [
        "control::rpc::tests::r19_another_cluster_is_refused_and_a_new_node_adopts_one_from_its_contacts_only"];
    R20: Seeds(Aim::at(&[K::ReadError])), [
        "scenarios::r20_a_block_that_cannot_be_read_comes_from_a_member_and_is_rewritten",
        "scenarios_schedules::a_zero_request_whose_both_edges_cannot_be_read_is_mended_and_carried_out"];
    R21: Seeds(Aim::at(&[K::SlowDisk, K::Crash, K::DiskLoss])), [
        "scenarios_rules::r21_the_answer_to_an_older_write_leaves_the_bit_of_a_newer_one_that_was_not_sent",
        "scenarios_rules::r21_the_answer_to_an_older_write_leaves_the_bit_of_a_newer_one_under_way"];
    R22: Seeds(Aim::ANY), [
        "scenarios_rules::r22_a_set_waits_for_a_write_of_its_own_behind_that_of_the_clear"];
    R23: Seeds(Aim::ANY), [
        "scenarios::r23_a_primary_in_another_reign_drops_its_requests_and_closes_the_connections"];
    R24: Seeds(Aim::at(&[K::ClientUnread])), [
        "scenarios::r24_a_closed_connection_starts_nothing_any_more",
        "reactor::tests::clients::r24_a_shut_down_client_is_found_before_the_ring_reports_it"];
    R25: Test("resize, whose data side is not built"), [
        "control::apply::tests::r25_a_resize_only_grows_and_needs_every_member_ready"];
    R26: Seeds(Aim::ANY), [
        "scenarios::r26_r27_no_answer_leaves_after_the_lease_has_run_out"];
    R27: Seeds(Aim::at(&[K::Pause])), [
        "reactor::tests::volume::r27_now_is_read_after_the_completion_was_reaped"];
    AckBeforeSecondary: Seeds(Aim::ANY), [
        "scenarios::a_new_volume_gets_its_second_replica_without_copying_zeroes"];
    RemoveBeforeCommit: Seeds(Aim::ANY), [
        "scenarios_rules::r14_while_a_removal_is_undecided_an_acknowledged_write_is_stable",
        "scenarios_rules::a_secondary_that_cannot_write_does_not_acknowledge_and_is_taken_out"];
    JoinBeforeResyncEnds: Seeds(Aim::ANY), [
        "scenarios_faults::r15_a_replaced_data_object_is_copied_whole"];
    RestartedInSync: Seeds(Aim::ANY), [
        "scenarios::r2_r10_a_restarted_member_counts_for_nothing_until_it_has_joined_again"];
    CopyOvertakesWrite: Seeds(Aim::ANY), [
        "scenarios_rules::r21_a_copy_waits_for_the_write_of_its_block"];
    ReorderOverlapping: Seeds(Aim::ANY), [
        "scenarios_rules::overlapping_writes_are_carried_out_in_the_same_order_everywhere"];
    FlushOnlyLocally: Seeds(Aim::at(&[K::PowerLossAll])), [
        "scenarios_rules::r5_a_flush_waits_for_the_others_and_for_the_own_disk",
        "scenarios::a_flush_covers_what_was_acknowledged_past_a_write_still_under_way"];
    IgnoreFlushError: Seeds(Aim::at(&[K::FlushError])), [
        "scenarios_faults::a_flush_error_fails_the_replica_at_once_and_is_not_retried"];
    DamagedPageClean: Seeds(Aim::at(&[K::MetaRot, K::Crash])), [
        "meta::bitmap_disk::tests::a_damaged_page_reads_all_set_and_its_neighbours_do_not",
        "scenarios_faults::damaged_bitmap_pages_make_a_resync_longer_never_shorter"];
    ReuseIncarnation: Seeds(Aim::at(&[K::PowerLoss])), [
        "control::store::tests::r13_a_store_is_never_created_by_opening_nor_over_another"];
    FenceByTerm: Seeds(Aim::ANY), [
        "control::apply::tests::every_change_of_primary_begins_a_reign_whatever_the_raft_term"];
    FailBack: Seeds(Aim::ANY), [
        "scenarios::whoever_has_joined_again_stays_secondary"];
    SendBeforeIntent: Seeds(Aim::ANY), [
        "scenarios::a_new_volume_gets_its_second_replica_without_copying_zeroes"];
    DropFrame: Seeds(Aim::ANY), [
        "scenarios::without_a_fault_every_write_is_answered_and_nobody_leaves"];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mutation_has_one_row_with_a_named_test() {
        let rows: Vec<_> = TABLE.iter().map(|row| row.mutation).collect();
        assert_eq!(rows, Mutation::ALL);
        assert!(TABLE.iter().all(|row| !row.tests.is_empty()));
    }
}
