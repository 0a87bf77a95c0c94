//! Where each node of a cluster configured by hand listens, where the others and the clients reach it, and
//! the `node.toml` that says so. Every directed way between two nodes has an address of its own, so that a
//! test can put a proxy on it: control addresses are taken from the dialing node's config, the peer
//! address is the one that the node itself registers.
//!
//! Writes nothing and starts nothing.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;

use crate::netns::{Bridge, NetNs};
use crate::status::NodeEntry;

/// One node before it is started.
#[derive(Clone, Debug)]
pub struct NodePlan {
    /// Its id.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// Whether it holds data; else it is a witness.
    pub data: bool,
    /// Its directory, as it sees it.
    pub dir: PathBuf,
    /// The address it listens on.
    pub listen: IpAddr,
    /// Port of its control plane.
    pub control: u16,
    /// Port of its replicas.
    pub peer: u16,
    /// Port for clients.
    pub nbd: u16,
    /// Where a node with that id reaches its control plane, if not where it listens.
    pub control_at: BTreeMap<u64, SocketAddr>,
    /// Where the others reach its replicas, if not where it listens.
    pub peer_at: Option<SocketAddr>,
    /// Where clients reach it, if not where it listens.
    pub nbd_at: Option<SocketAddr>,
    /// Where its data object lies, if not in its directory.
    pub data_path: Option<PathBuf>,
    /// The network namespace that it runs in, if not ours.
    pub netns: Option<Arc<NetNs>>,
}

impl NodePlan {
    /// A node on loopback.
    #[must_use]
    pub fn new(id: u64, data: bool, dir: PathBuf, [control, peer, nbd]: [u16; 3]) -> Self {
        Self {
            id,
            name: format!("n{id}"),
            data,
            dir,
            listen: IpAddr::V4(Ipv4Addr::LOCALHOST),
            control,
            peer,
            nbd,
            control_at: BTreeMap::new(),
            peer_at: None,
            nbd_at: None,
            data_path: None,
            netns: None,
        }
    }

    /// Puts each node on the host of a switch that has its id for a number.
    ///
    /// # Errors
    /// If an id is no number of a host.
    pub fn on_hosts(plans: &mut [Self], bridge: &Bridge) -> Result<()> {
        for plan in plans {
            let host = u8::try_from(plan.id)?;
            plan.listen = Bridge::addr(host);
            plan.netns = Some(bridge.host(host));
        }
        Ok(())
    }

    /// `data` or `witness`.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        if self.data { "data" } else { "witness" }
    }

    /// Where its control plane listens.
    #[must_use]
    pub fn control_listen(&self) -> SocketAddr {
        SocketAddr::new(self.listen, self.control)
    }

    /// Where its replicas listen.
    #[must_use]
    pub fn peer_listen(&self) -> SocketAddr {
        SocketAddr::new(self.listen, self.peer)
    }

    /// Where it listens for clients.
    #[must_use]
    pub fn nbd_listen(&self) -> SocketAddr {
        SocketAddr::new(self.listen, self.nbd)
    }

    /// Its `node.toml`, in a cluster of `all`; `timing` is the `[timing]` table or nothing.
    #[must_use]
    pub fn config(&self, all: &[Self], timing: &str, volume: &str) -> String {
        let founders: String = all.iter().map(|other| other.founder(self.id)).collect();
        let mut text = format!("{}{timing}{founders}", self.own());
        if let Some(data) = &self.data_path {
            text += &format!("[volume.{volume}]\ndata = \"{}\"\n", data.display());
        }
        text
    }

    /// The `[node]` and `[listen]` tables of its own file.
    fn own(&self) -> String {
        let Self { id, name, .. } = self;
        let dir = self.dir.display();
        let mut text = format!(
            "[node]\nid = {id}\nname = \"{name}\"\nkind = \"{}\"\ndir = \"{dir}\"\n\n\
             [listen]\ncontrol = \"{}\"\npeer = \"{}\"\nadmin = \"{dir}/admin.sock\"\n",
            self.kind(),
            self.control_listen(),
            self.peer_listen(),
        );
        if self.data {
            text += &format!("nbd_tcp = \"{}\"\nnbd_unix = \"{dir}/nbd.sock\"\n", self.nbd_listen());
        }
        text + "\n"
    }

    /// Its `[[cluster]]` table in the file of the node `reader`.
    fn founder(&self, reader: u64) -> String {
        let Self { id, name, .. } = self;
        let control = self.control_at.get(&reader).copied().unwrap_or_else(|| self.control_listen());
        let peer = self.peer_at.unwrap_or_else(|| self.peer_listen());
        let kind = self.kind();
        let mut text = format!(
            "[[cluster]]\nid = {id}\nname = \"{name}\"\nkind = \"{kind}\"\ncontrol = \"{control}\"\n\
             peer = \"{peer}\"\n"
        );
        if self.data {
            text += &format!("nbd = \"{}\"\n", self.nbd_at.unwrap_or_else(|| self.nbd_listen()));
        }
        text + "\n"
    }

    /// What `cluster.json` would say of it.
    #[must_use]
    pub fn entry(&self, volume: &str) -> NodeEntry {
        let file = |name: String| self.data.then(|| self.dir.join(name));
        let nbd = self.nbd_at.unwrap_or_else(|| self.nbd_listen());
        NodeEntry {
            id: self.id,
            name: self.name.clone(),
            kind: self.kind().to_owned(),
            pid: None,
            nbd_unix: self
                .data
                .then(|| format!("nbd+unix:///{volume}?socket={}/nbd.sock", self.dir.display())),
            nbd_tcp: self.data.then(|| format!("nbd://{nbd}/{volume}")),
            admin: self.dir.join("admin.sock"),
            config: self.dir.join("node.toml"),
            data: self.data_path.clone().or_else(|| file(format!("{volume}.data"))),
            meta: file(format!("{volume}.meta")),
        }
    }
}

/// The `[timing]` table for a lease of that length: the other times keep their proportions to it.
#[must_use]
pub fn timing(lease_ms: Option<u64>) -> String {
    let Some(lease) = lease_ms else {
        return String::new();
    };
    // 1500, 400, 100, 400 and 800 by default.
    let part = |of_default: u64| lease * of_default / 1500;
    let (renew, heartbeat, shortest, longest) = (part(400), part(100), part(400), part(800));
    format!(
        "[timing]\nlease_ms = {lease}\nrenew_ms = {renew}\nheartbeat_ms = {heartbeat}\n\
         election_min_ms = {shortest}\nelection_max_ms = {longest}\n\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reader_dials_by_an_address_of_its_own() {
        let mut plan = NodePlan::new(2, true, PathBuf::from("/x/n2"), [1001, 1002, 1003]);
        plan.control_at.insert(1, "127.0.0.1:2001".parse().unwrap());
        plan.peer_at = Some("127.0.0.1:2002".parse().unwrap());
        let first = NodePlan::new(1, true, PathBuf::from("/x/n1"), [1, 2, 3]);
        let all = [first.clone(), plan.clone()];
        let seen = |text: &str| -> (String, String) {
            let value: toml::Table = toml::from_str(text).unwrap();
            let founder = value["cluster"][1].clone();
            let word = |key: &str| founder[key].as_str().unwrap().to_owned();
            (word("control"), word("peer"))
        };
        let by_first = seen(&first.config(&all, &timing(Some(600)), "vol0"));
        assert_eq!(by_first, ("127.0.0.1:2001".into(), "127.0.0.1:2002".into()));
        let by_itself = seen(&plan.config(&all, "", "vol0"));
        assert_eq!(by_itself, ("127.0.0.1:1001".into(), "127.0.0.1:2002".into()));
        assert!(plan.own().contains("127.0.0.1:1002"));
    }
}
