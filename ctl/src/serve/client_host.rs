//! How clients are told apart: by the machine that they are on.
//!
//! Pure. NBD has no names of clients, so what is told apart is hosts: connections over the unix socket and over
//! loopback are from the node's own machine; others are from where their address says. An address of a node's names
//! that node, so that a client on a node's machine is the same one, whichever node it reaches and by whichever way.
//! Nodes whose control planes have one address are on one machine, which has the name of the first of them; an `nbd`
//! address that several machines share (one that moves with the service) is nobody's.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use blkrepl_engine::control::{ClusterState, NodeRecord};
use blkrepl_engine::types::NodeId;
use blkrepl_nbd::Peer;

/// The host of a client that has connected to the node `here` from `peer`: a node's name or an address.
pub fn client_host(state: &ClusterState, here: NodeId, peer: Peer) -> String {
    let Some(addr) = peer.elsewhere() else {
        let me = state.nodes.get(&here);
        return me.map_or_else(|| state.node_label(here), |node| machine(state, node));
    };
    let with = |of: fn(&NodeRecord) -> Vec<&str>| -> BTreeSet<String> {
        let nodes = state.nodes.values();
        let found = nodes.filter(|node| of(node).into_iter().filter_map(ip).any(|ip| ip == addr));
        found.map(|node| machine(state, node)).collect()
    };
    let mut machines = with(|node| vec![&node.addrs.control, &node.addrs.peer]);
    if machines.is_empty() {
        machines = with(|node| vec![&node.addrs.nbd]);
    }
    match (machines.pop_first(), machines.is_empty()) {
        (Some(only), true) => only,
        _ => addr.to_string(),
    }
}

/// The name of the machine that a node is on: that of the first node whose control plane has the same address.
fn machine(state: &ClusterState, node: &NodeRecord) -> String {
    let own = ip(&node.addrs.control);
    let same = |other: &&NodeRecord| own.is_some() && ip(&other.addrs.control) == own;
    state.nodes.values().find(same).unwrap_or(node).name.clone()
}

/// The address in `host:port`, if the host is one.
fn ip(text: &str) -> Option<IpAddr> {
    let addr: SocketAddr = text.parse().ok()?;
    Some(addr.ip().to_canonical())
}

#[cfg(test)]
mod tests {
    use blkrepl_engine::control::{NodeAddrs, NodeKind, StoreId};

    use super::*;

    fn node(id: u64, control: &str, nbd: &str) -> (NodeId, NodeRecord) {
        let addrs = NodeAddrs { control: control.into(), peer: String::new(), nbd: nbd.into() };
        let record = NodeRecord {
            id: NodeId(id),
            name: format!("n{id}"),
            kind: NodeKind::Data,
            addrs,
            store: StoreId(u128::from(id)),
            incarnation: None,
            os_boot: 0,
        };
        (NodeId(id), record)
    }

    fn state(nodes: [(NodeId, NodeRecord); 2]) -> ClusterState {
        ClusterState { nodes: nodes.into(), ..ClusterState::default() }
    }

    fn tcp(remote: &str, local: &str) -> Peer {
        Peer::Tcp { remote: remote.parse().unwrap(), local: local.parse().unwrap() }
    }

    #[test]
    fn a_client_on_a_nodes_machine_is_the_same_one_wherever_it_connects() {
        let s = state([
            node(1, "10.0.0.1:7101", "192.0.2.1:10809"),
            node(2, "10.0.0.2:7101", "n2.example:10809"),
        ]);
        let (n1, n2) = (NodeId(1), NodeId(2));
        for peer in [Peer::Unix, tcp("127.0.0.1", "127.0.0.1"), tcp("192.0.2.1", "192.0.2.1")] {
            assert_eq!(client_host(&s, n1, peer), "n1");
        }
        for remote in ["10.0.0.1", "192.0.2.1", "::ffff:10.0.0.1"] {
            assert_eq!(client_host(&s, n2, tcp(remote, "10.0.0.2")), "n1");
        }
        assert_eq!(client_host(&s, n2, Peer::Unix), "n2");
        assert_eq!(client_host(&s, n1, tcp("10.0.0.2", "10.0.0.1")), "n2");
    }

    #[test]
    fn a_client_elsewhere_has_the_name_of_its_address() {
        let s = state([node(1, "10.0.0.1:7101", ""), node(2, "10.0.0.2:7101", "")]);
        assert_eq!(client_host(&s, NodeId(1), tcp("10.0.0.9", "10.0.0.1")), "10.0.0.9");
        assert_eq!(client_host(&s, NodeId(2), tcp("::ffff:10.0.0.9", "::")), "10.0.0.9");
    }

    #[test]
    fn nodes_on_one_machine_have_the_same_clients() {
        let s = state([node(1, "127.0.0.1:7101", "127.0.0.1:1"), node(2, "127.0.0.1:7201", "127.0.0.1:2")]);
        for here in [NodeId(1), NodeId(2)] {
            assert_eq!(client_host(&s, here, Peer::Unix), "n1");
            assert_eq!(client_host(&s, here, tcp("127.0.0.1", "127.0.0.1")), "n1");
        }
    }

    /// A service address that moves with the primary, and ones that say nothing.
    #[test]
    fn an_nbd_address_that_several_machines_have_is_nobodys() {
        for nbd in ["10.0.0.100:10809", "127.0.0.1:10809", "0.0.0.0:10809"] {
            let s = state([node(1, "10.0.0.1:7101", nbd), node(2, "10.0.0.2:7101", nbd)]);
            assert_eq!(client_host(&s, NodeId(2), Peer::Unix), "n2");
            assert_eq!(client_host(&s, NodeId(2), tcp("127.0.0.1", "127.0.0.1")), "n2");
            assert_eq!(client_host(&s, NodeId(2), tcp("10.0.0.1", "10.0.0.100")), "n1");
            assert_eq!(client_host(&s, NodeId(2), tcp("10.0.0.100", "10.0.0.2")), "10.0.0.100");
        }
    }
}
