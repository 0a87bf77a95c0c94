//! Properties of what crosses the admin socket: every request, reply, status and event is one line that reads
//! back as it was, and no line, however wrong, panics.

use std::fmt::Debug;

use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use serde::de::DeserializeOwned;

use super::*;
use crate::events::EventRecord;

fn durability() -> impl Strategy<Value = DurabilityWord> {
    prop_oneof![Just(DurabilityWord::Flush), Just(DurabilityWord::Always)]
}

fn sharing() -> impl Strategy<Value = SharingWord> {
    prop_oneof![Just(SharingWord::Exclusive), Just(SharingWord::Shared)]
}

fn request() -> impl Strategy<Value = Request> {
    let create = (any::<String>(), any::<u64>(), vec(any::<String>(), 0..4), durability(), sharing());
    prop_oneof![
        Just(Request::Status {}),
        any::<(u64, bool)>().prop_map(|(after, follow)| Request::Events { after, follow }),
        create.prop_map(|(volume, size, replicas, durability, sharing)| Request::VolumeCreate {
            volume,
            size,
            replicas,
            durability,
            sharing,
        }),
        (any::<String>(), change(), option::of(sharing()))
            .prop_map(|(volume, change, sharing)| Request::VolumeSet { volume, change, sharing }),
        any::<(String, bool)>()
            .prop_map(|(volume, discard_data)| Request::VolumeRecreate { volume, discard_data }),
        any::<(String, bool, bool)>().prop_map(|(volume, force, discard_inconsistent)| Request::Promote {
            volume,
            force,
            discard_inconsistent,
        }),
        any::<String>().prop_map(|volume| Request::Demote { volume }),
        any::<(String, String)>().prop_map(|(volume, to)| Request::Move { volume, to }),
        any::<(String, String)>().prop_map(|(volume, client)| Request::Detach { volume, client }),
        any::<u64>().prop_map(|ms| Request::SetLease { ms }),
    ]
}

fn change() -> impl Strategy<Value = SettingsChange> {
    let times = any::<(Option<u64>, Option<u64>, Option<u64>)>();
    (times, any::<(Option<u32>, Option<u32>)>()).prop_map(|((peer, disk, latency), (regions, window))| {
        SettingsChange {
            peer_timeout_ms: peer,
            disk_timeout_ms: disk,
            intent_regions_max: regions,
            resync_window_bytes: window,
            resync_latency_ms: latency,
        }
    })
}

prop_compose! {
    fn settings()(
        (peer_timeout_ms, disk_timeout_ms, resync_latency_ms) in any::<(u64, u64, u64)>(),
        (intent_regions_max, resync_window_bytes) in any::<(u32, u32)>(),
    ) -> SettingsView {
        SettingsView {
            peer_timeout_ms, disk_timeout_ms, intent_regions_max, resync_window_bytes, resync_latency_ms,
        }
    }
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            btree_map(any::<String>(), inner, 0..4).prop_map(|map| map.into_iter().collect()),
        ]
    })
}

fn reply() -> impl Strategy<Value = Reply> {
    prop_oneof![value().prop_map(Reply::Ok), any::<String>().prop_map(Reply::Error)]
}

prop_compose! {
    fn event()(
        (seq, time_ms) in any::<(u64, u64)>(),
        (node, volume, kind, text) in any::<(String, Option<String>, String, String)>(),
        data in btree_map(any::<String>(), value(), 0..3),
    ) -> EventRecord {
        EventRecord { seq, time_ms, node, volume, kind, text, data: data.into_iter().collect() }
    }
}

prop_compose! {
    fn node()(
        (id, boot) in any::<(u64, u64)>(),
        (reachable, leader) in any::<(bool, bool)>(),
        (name, kind, control, peer, nbd) in any::<(String, String, String, String, String)>(),
        clients in option::of(btree_map(any::<String>(), any::<u64>(), 0..3)),
    ) -> NodeView {
        NodeView { id, name, kind, reachable, leader, boot, control, peer, nbd, clients }
    }
}

prop_compose! {
    fn resync()(
        (done_bytes, total_bytes, moved_bytes, bytes_per_s) in any::<(u64, u64, u64, u64)>(),
        eta_s in any::<Option<u64>>(),
    ) -> ResyncView {
        ResyncView { done_bytes, total_bytes, moved_bytes, bytes_per_s, eta_s }
    }
}

prop_compose! {
    fn replica()(
        (node, role, state, failure) in any::<(String, String, String, Option<String>)>(),
        (dirty_bytes, epoch) in any::<(Option<u64>, Option<u64>)>(),
        (writes_acked, intent_regions) in any::<(Option<u64>, Option<u64>)>(),
        resync in option::of(resync()),
    ) -> ReplicaView {
        ReplicaView { node, role, state, dirty_bytes, resync, epoch, writes_acked, intent_regions, failure }
    }
}

prop_compose! {
    fn volume()(
        (name, id, lineage) in any::<(String, String, String)>(),
        (size, block_size, epoch, reign) in any::<(u64, u32, u64, u64)>(),
        (durability, settings) in (durability(), option::of(settings())),
        (primary, note, attached) in any::<(Option<String>, Option<String>, Option<String>)>(),
        sharing in sharing(),
        (demoted, serving, degraded) in any::<(bool, bool, bool)>(),
        in_sync in vec(any::<String>(), 0..3),
        replicas in vec(replica(), 0..3),
    ) -> VolumeView {
        VolumeView {
            name, id, size, block_size, durability, settings, sharing, attached, epoch, reign, lineage, primary,
            demoted, serving, degraded, in_sync, note, replicas,
        }
    }
}

prop_compose! {
    fn status()(
        (cluster, asked, leader) in any::<(Option<String>, String, Option<String>)>(),
        nodes in vec(node(), 0..3),
        volumes in vec(volume(), 0..2),
    ) -> StatusView {
        StatusView { cluster, asked, leader, nodes, volumes }
    }
}

prop_compose! {
    fn done()(
        (volume, epoch, primary, text) in any::<(Option<String>, Option<u64>, Option<String>, String)>(),
    ) -> Done {
        Done { volume, epoch, primary, text }
    }
}

/// Sends a value as the result of a request, and takes it out of the line at the other end.
fn crosses<T: Serialize + DeserializeOwned + PartialEq + Debug>(sent: &T) -> Result<(), TestCaseError> {
    let line = serde_json::to_string(&server::to_reply(sent)).unwrap();
    prop_assert!(!line.contains('\n'), "{}", line);
    let Ok(Reply::Ok(value)) = serde_json::from_str::<Reply>(&line) else {
        return Err(TestCaseError::fail(line));
    };
    prop_assert_eq!(&serde_json::from_value::<T>(value).unwrap(), sent);
    Ok(())
}

proptest! {
    #[test]
    fn any_request_is_one_line_that_reads_back(request in request()) {
        let line = serde_json::to_string(&request).unwrap();
        prop_assert!(!line.contains('\n'), "{}", line);
        prop_assert_eq!(serde_json::from_str::<Request>(&line).unwrap(), request);
    }

    #[test]
    fn a_request_with_a_field_of_another_version_is_refused(request in request(), key in "[a-z]{1,6}_x") {
        let mut value = serde_json::to_value(&request).unwrap();
        value.as_object_mut().unwrap().insert(key.clone(), Value::Bool(true));
        let error = serde_json::from_value::<Request>(value).unwrap_err().to_string();
        prop_assert!(error.contains(&key), "{}", error);
    }

    #[test]
    fn a_request_that_was_cut_off_is_refused(request in request(), at in any::<prop::sample::Index>()) {
        let line = serde_json::to_vec(&request).unwrap();
        prop_assert!(serde_json::from_slice::<Request>(&line[..at.index(line.len())]).is_err());
    }

    #[test]
    fn any_reply_is_one_line_that_reads_back(reply in reply()) {
        let line = serde_json::to_string(&reply).unwrap();
        prop_assert!(!line.contains('\n'), "{}", line);
        prop_assert_eq!(serde_json::from_str::<Reply>(&line).unwrap(), reply);
    }

    #[test]
    fn any_status_crosses(status in status()) {
        crosses(&status)?;
    }

    #[test]
    fn any_event_crosses(event in event()) {
        crosses(&event)?;
    }

    #[test]
    fn any_outcome_crosses(done in done()) {
        crosses(&done)?;
    }

    #[test]
    fn other_bytes_are_no_request_and_no_reply(bytes in vec(any::<u8>(), 0..200)) {
        prop_assert!(serde_json::from_slice::<Request>(&bytes).is_err());
        prop_assert!(serde_json::from_slice::<Reply>(&bytes).is_err());
    }
}
