//! What the control plane reads from its log, its snapshots and other nodes.

use std::fmt::Debug;
use std::sync::LazyLock;
use std::time::Duration;

use blkrepl_engine::control::codec::{BODY_LEN_MAX, CODEC_VERSION, decode, encode};
use blkrepl_engine::control::{
    Applied, ClusterOp, ClusterState, Command, NodeAddrs, NodeKind, NodeRecord, RequestId, StoreId, apply,
};
use blkrepl_engine::types::{
    ClusterId, Geometry, Incarnation, LineageId, LogIndex, Member, NodeId, VolumeId, VolumeSettings,
};
use blkrepl_engine::wire::{PeerMsg, encode as encode_frame};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Verdict;
use crate::input::Input;

pub(crate) const VOLUME: VolumeId = VolumeId(7);

/// A run of a node of [`founded`].
pub(crate) fn member(node: u64) -> Member {
    Member { node: NodeId(node), incarnation: Incarnation { boot: 1, nonce: node } }
}

/// A command of node 1.
pub(crate) fn command(number: u64, op: ClusterOp) -> Command {
    let Member { node, incarnation } = member(1);
    Command { request: RequestId { node, incarnation, volume: None, number }, only_under: None, op }
}

/// The commands that form a cluster of two data nodes and a witness, with one volume.
pub(crate) fn founding() -> Vec<ClusterOp> {
    let kinds = [NodeKind::Data, NodeKind::Data, NodeKind::Witness];
    let node = |(id, kind)| NodeRecord {
        id: NodeId(id),
        name: format!("n{id}"),
        kind,
        addrs: NodeAddrs::default(),
        store: StoreId(u128::from(id)),
        incarnation: None,
        os_boot: 0,
    };
    let nodes = (1..).zip(kinds).map(node).collect();
    let mut ops =
        vec![ClusterOp::InitCluster { cluster: ClusterId(9), lease: Duration::from_millis(1500), nodes }];
    ops.extend((1..=3).map(member).map(|Member { node, incarnation }| ClusterOp::Register {
        node,
        incarnation,
        os_boot: 1,
        addrs: NodeAddrs { control: format!("10.0.0.{}:7100", node.0), ..NodeAddrs::default() },
    }));
    ops.push(ClusterOp::CreateVolume {
        id: VOLUME,
        name: "vol0".into(),
        geometry: Geometry::new(1 << 20, 4096, 65_536).expect("a good geometry"),
        settings: VolumeSettings::default(),
        replicas: vec![NodeId(1), NodeId(2)],
        first: member(1),
        lineage: LineageId(1),
    });
    ops
}

/// The state after [`founding`].
pub(crate) fn founded() -> ClusterState {
    let mut state = ClusterState::default();
    for (number, op) in (1..).zip(founding()) {
        let applied = apply(&mut state, LogIndex(number), command(number, op));
        assert!(applied.is_done(), "{applied}");
    }
    state
}

/// Values of the control plane. Control byte modulo 4: 0 the bytes as they are, 1 a command, 2 a snapshot of
/// the cluster state, 3 a result; for those the envelope is made. Holds: what was decoded encodes to a
/// value that decodes to the same; a command keeps the state's invariants, whatever it says, and every
/// volume's config of a state that passes its check can be sent to a peer.
pub fn control_codec(data: &[u8]) -> Verdict {
    let mut input = Input::new(data);
    let control = input.u8();
    let body = input.rest();
    match control % 4 {
        0 => Verdict::of(
            value::<Command>(body).is_some()
                || value::<ClusterState>(body).is_some()
                || value::<Applied>(body).is_some(),
        ),
        1 => value::<Command>(&envelope(body)).map_or(Verdict::Refused, on_command),
        2 => value::<ClusterState>(&envelope(body)).map_or(Verdict::Refused, |state| on_state(&state)),
        _ => Verdict::of(value::<Applied>(&envelope(body)).is_some()),
    }
}

fn on_command(command: Command) -> Verdict {
    static FOUNDED: LazyLock<ClusterState> = LazyLock::new(founded);
    let mut state = FOUNDED.clone();
    let before = state.clone();
    let index = LogIndex(state.applied.0 + 1);
    let applied = apply(&mut state, index, command.clone());
    assert_eq!(state.check(), Ok(()));
    if !applied.is_done() {
        assert_eq!((&state.nodes, &state.volumes), (&before.nodes, &before.volumes), "a refusal changed it");
    }
    if state.recent.contains_key(&command.request.node) {
        assert_eq!(apply(&mut state, LogIndex(index.0 + 1), command), applied, "a request applied twice");
    }
    on_state(&state)
}

fn on_state(state: &ClusterState) -> Verdict {
    if let Err(broken) = state.check() {
        assert!(!broken.is_empty());
        return Verdict::Refused;
    }
    for view in state.volumes.keys().filter_map(|volume| state.config_view(*volume)) {
        encode_frame(&PeerMsg::Config(Box::new(view)), &mut Vec::new());
    }
    Verdict::Accepted
}

fn value<T: Serialize + DeserializeOwned + PartialEq + Debug>(bytes: &[u8]) -> Option<T> {
    let value: T = decode(bytes).ok()?;
    let again = encode(&value).expect("what fitted an envelope fits one again");
    assert_eq!(decode::<T>(&again).as_ref(), Ok(&value));
    Some(value)
}

/// `body` in an envelope: version, length, checksum over those and the body.
pub(crate) fn envelope(body: &[u8]) -> Vec<u8> {
    let body = &body[..body.len().min(BODY_LEN_MAX)];
    let len = u32::try_from(body.len()).expect("at most the longest body");
    let prefix = [&[CODEC_VERSION][..], &len.to_le_bytes()].concat();
    let crc = crc32fast::hash(&[&prefix, body].concat());
    [&prefix, &crc.to_le_bytes()[..], body].concat()
}
