//! Hosts in network namespaces, joined by a bridge: a node in a namespace of its own reaches the others over
//! real links that can be cut, with TCP's own retransmissions and time-outs between the ends. Needs root.
//!
//! The namespaces have no names and no files: they end with the last descriptor and process in them, also
//! after a test that was killed. Nothing is changed in the namespace that the tests were started in: the
//! bridge lies in one that [`Bridge::new`] moves the calling thread into (threads and processes that it
//! starts from then on are there as well).

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::proc::{self, Proc, run_ok};
use crate::wait::wait_for;

const STEP_LIMIT: Duration = Duration::from_secs(20);
/// The word of `ip` for the bridge that a port belongs to; not one of ours.
const OF_BRIDGE: &str = concat!("mas", "ter");
/// Where a frame goes that is to reach nobody.
const NOBODY: &str = "02:00:00:00:ff:fe";

/// A network namespace.
#[derive(Debug)]
pub struct NetNs {
    file: File,
}

impl NetNs {
    /// A new one, with its loopback up.
    ///
    /// # Errors
    /// Where the machine does not allow it.
    pub fn new() -> Result<Self> {
        let log = tempfile::NamedTempFile::new().context("make a log")?;
        let mut command = Command::new("unshare");
        command.args(["--net", "sleep", "60"]);
        // It lives until its namespace is held by our descriptor.
        let mut holder = Proc::spawn("unshare", &mut command, log.path())?;
        let path = format!("/proc/{}/ns/net", holder.pid());
        let own = std::fs::read_link("/proc/thread-self/ns/net").context("look at our network namespace")?;
        let file = wait_for("a network namespace", STEP_LIMIT, || {
            ensure!(holder.exited()?.is_none(), "unshare ended: {}", holder.output());
            ensure!(std::fs::read_link(&path)? != own, "not yet");
            Ok(File::open(&path)?)
        })?;
        drop(holder);
        let netns = Self { file };
        netns.ip(&["link", "set", "lo", "up"])?;
        Ok(netns)
    }

    /// Runs `body` on a thread inside, and with it what `body` starts.
    ///
    /// # Errors
    /// Where the namespace cannot be entered; what `body` returns.
    pub fn within<T: Send>(&self, body: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                self.enter()?;
                body()
            });
            inside.join().map_err(|_| anyhow!("a thread in a network namespace died"))?
        })
    }

    /// Moves the calling thread inside.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn enter(&self) -> Result<()> {
        move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))
            .context("enter a network namespace")
    }

    fn ip(&self, args: &[&str]) -> Result<()> {
        self.within(|| run_ok("ip", args, STEP_LIMIT).map(drop))
    }
}

/// Why hosts in namespaces cannot be had here; none if they can.
#[must_use]
pub fn unavailable() -> Option<String> {
    if !proc::is_root() {
        return Some("network namespaces need root".to_owned());
    }
    if let Some(reason) = proc::missing(&["ip", "bridge", "unshare"]) {
        return Some(reason);
    }
    // Tried, because a container may refuse any part of it.
    let tried = NetNs::new().and_then(|probe| {
        probe.ip(&["link", "add", "b0", "type", "bridge"])?;
        probe.ip(&["link", "add", "v0", "type", "veth", "peer", "name", "v1"])
    });
    tried.err().map(|reason| format!("no bridge or veth in a network namespace: {reason:#}"))
}

/// A switch with hosts on it. Host `n` has the address 10.83.0.n, we have 10.83.0.254.
pub struct Bridge {
    hosts: Vec<Arc<NetNs>>,
}

impl Bridge {
    /// Makes the switch and so many hosts, and moves the calling thread to where the switch is.
    ///
    /// # Errors
    /// Where a step fails.
    pub fn new(hosts: u8) -> Result<Self> {
        let here = NetNs::new()?;
        here.enter()?;
        ip("link add b0 type bridge forward_delay 0")?;
        ip("addr add 10.83.0.254/24 dev b0")?;
        ip("link set b0 up")?;
        let mut bridge = Self { hosts: Vec::new() };
        for host in 1..=hosts {
            let netns = NetNs::new()?;
            ip(&format!("link add v{host} type veth peer name p{host}"))?;
            let inside = format!("/proc/{}/fd/{}", std::process::id(), raw(&netns.file));
            run_ok("ip", &["link", "set", &format!("p{host}"), "netns", &inside], STEP_LIMIT)?;
            ip(&format!("link set v{host} {OF_BRIDGE} b0 up"))?;
            netns.ip(&["link", "set", &format!("p{host}"), "name", "eth0", "address", &mac(host), "up"])?;
            netns.ip(&["addr", "add", &format!("10.83.0.{host}/24"), "dev", "eth0"])?;
            bridge.hosts.push(Arc::new(netns));
        }
        Ok(bridge)
    }

    /// The namespace of a host, counted from 1.
    #[must_use]
    pub fn host(&self, host: u8) -> Arc<NetNs> {
        Arc::clone(&self.hosts[usize::from(host) - 1])
    }

    /// Its address.
    #[must_use]
    pub fn addr(host: u8) -> IpAddr {
        IpAddr::V4(Ipv4Addr::new(10, 83, 0, host))
    }

    /// Pulls a host's cable.
    ///
    /// # Errors
    /// Where `ip` fails.
    pub fn cut(&self, host: u8) -> Result<()> {
        ip(&format!("link set v{host} down"))
    }

    /// Frames from one host to another go astray; the other way they arrive.
    ///
    /// # Errors
    /// Where `ip` fails.
    pub fn cut_one_way(&self, from: u8, to: u8) -> Result<()> {
        let addr = Self::addr(to).to_string();
        let args = ["neigh", "replace", &addr, "lladdr", NOBODY, "dev", "eth0", "nud", "permanent"];
        self.host(from).ip(&args)
    }

    /// Two hosts do not see each other; everybody else sees both.
    ///
    /// # Errors
    /// Where `bridge` fails.
    pub fn cut_pair(&self, one: u8, other: u8) -> Result<()> {
        [one, other].iter().try_for_each(|host| isolate(*host, true))
    }

    /// All cables and ways are whole again.
    ///
    /// # Errors
    /// Where a step fails.
    pub fn heal(&self) -> Result<()> {
        for host in 1..=u8::try_from(self.hosts.len())? {
            ip(&format!("link set v{host} up"))?;
            isolate(host, false)?;
            for other in (1..=u8::try_from(self.hosts.len())?).filter(|other| *other != host) {
                self.heal_one_way(host, other)?;
            }
        }
        Ok(())
    }

    /// Ends what [`Self::cut_one_way`] did.
    fn heal_one_way(&self, from: u8, to: u8) -> Result<()> {
        let (addr, mac) = (Self::addr(to).to_string(), mac(to));
        self.host(from).ip(&["neigh", "replace", &addr, "lladdr", &mac, "dev", "eth0", "nud", "reachable"])
    }
}

fn isolate(host: u8, on: bool) -> Result<()> {
    let port = format!("v{host}");
    let word = if on { "on" } else { "off" };
    run_ok("bridge", &["link", "set", "dev", &port, "isolated", word], STEP_LIMIT).map(drop)
}

fn ip(line: &str) -> Result<()> {
    let words: Vec<&str> = line.split_whitespace().collect();
    run_ok("ip", &words, STEP_LIMIT).map(drop)
}

fn mac(host: u8) -> String {
    format!("02:00:00:00:00:{host:02x}")
}

fn raw(file: &File) -> i32 {
    use std::os::fd::AsRawFd;
    file.as_raw_fd()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpListener, TcpStream};

    /// Says "hello" from one host to another over a new connection.
    fn talk(bridge: &Bridge, from: u8, to: u8) -> Result<()> {
        let listener = bridge.host(to).within(|| Ok(TcpListener::bind((Bridge::addr(to), 7000))?))?;
        listener.set_nonblocking(true)?;
        let at = SocketAddr::new(Bridge::addr(to), 7000);
        let limit = Duration::from_millis(400);
        let mut client = bridge.host(from).within(|| Ok(TcpStream::connect_timeout(&at, limit)?))?;
        let (mut server, _) = listener.accept()?;
        client.write_all(b"hello")?;
        server.set_nonblocking(false)?;
        server.set_read_timeout(Some(limit))?;
        let mut got = [0; 5];
        server.read_exact(&mut got)?;
        Ok(())
    }

    #[test]
    fn links_between_hosts_are_cut_and_healed() {
        if let Some(reason) = unavailable() {
            crate::report::skipped("netns", &reason);
            return;
        }
        let outside = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        // The thread that makes the bridge moves; this one stays where it is.
        let tried = std::thread::spawn(|| {
            let bridge = Bridge::new(3).unwrap();
            talk(&bridge, 1, 2).unwrap();
            bridge.cut(2).unwrap();
            talk(&bridge, 1, 2).unwrap_err();
            talk(&bridge, 1, 3).unwrap();
            bridge.heal().unwrap();
            talk(&bridge, 1, 2).unwrap();
            bridge.cut_pair(1, 2).unwrap();
            talk(&bridge, 1, 2).unwrap_err();
            talk(&bridge, 1, 3).unwrap();
            talk(&bridge, 3, 2).unwrap();
            bridge.heal().unwrap();
            bridge.cut_one_way(2, 1).unwrap();
            talk(&bridge, 1, 2).unwrap_err();
            talk(&bridge, 3, 2).unwrap();
            bridge.heal().unwrap();
            talk(&bridge, 2, 1).unwrap();
        });
        tried.join().unwrap();
        assert_eq!(std::fs::read_link("/proc/thread-self/ns/net").unwrap(), outside);
    }
}
