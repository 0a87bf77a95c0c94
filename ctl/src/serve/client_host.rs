//! How clients are told apart: by the machine that they are on.
//!
//! Pure. NBD has no names of clients, so what is told apart is hosts: connections over the unix socket and over
//! loopback are from the node's own machine; others are from where their address says. An address that belongs to a
//! node of the cluster names that node, so that a client on a node's machine is the same one, whichever node it
//! reaches and by whichever way. Nodes that share an address (all on loopback, say) are on one machine, which has
//! the name of the first of them.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use blkrepl_engine::control::{ClusterState, NodeRecord};
use blkrepl_engine::types::NodeId;
use blkrepl_nbd::Peer;

/// The host of a client that has connected to the node `here` from `peer`: a node's name or an address.
pub fn client_host(state: &ClusterState, here: NodeId, peer: Peer) -> String {
    let addrs = match peer.elsewhere() {
        Some(addr) => BTreeSet::from([addr]),
        None => state.nodes.get(&here).map(addresses).unwrap_or_default(),
    };
    let named = state.nodes.values().find(|node| !addresses(node).is_disjoint(&addrs));
    match (named, peer.elsewhere()) {
        (Some(node), _) => node.name.clone(),
        (None, Some(addr)) => addr.to_string(),
        (None, None) => state.node_label(here),
    }
}

/// The addresses of the machine that a node is on. Loopback, which every machine has, tells nothing beside others.
fn addresses(node: &NodeRecord) -> BTreeSet<IpAddr> {
    let addrs = &node.addrs;
    let parsed = [&addrs.control, &addrs.peer, &addrs.nbd].into_iter().filter_map(|text| text.parse().ok());
    let mut found: BTreeSet<IpAddr> = parsed.map(|addr: SocketAddr| addr.ip().to_canonical()).collect();
    found.retain(|addr| !addr.is_unspecified());
    if found.iter().any(|addr| !addr.is_loopback()) {
        found.retain(|addr| !addr.is_loopback());
    }
    found
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

    #[test]
    fn a_wildcard_or_loopback_beside_an_address_is_nobodys() {
        let s =
            state([node(1, "10.0.0.1:7101", "127.0.0.1:10809"), node(2, "10.0.0.2:7101", "0.0.0.0:10809")]);
        assert_eq!(client_host(&s, NodeId(2), tcp("127.0.0.1", "127.0.0.1")), "n2");
    }
}
