//! The keeper against servers in this process and a device that is only counted: what it goes on with, and what not.
//! What a kernel makes of it: `tests/tests/vm_*.rs`.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use blkrepl_nbd::{
    Admitting, ExportInfo, ExportRefusal, Exports, ListenAddr, Peer, Place, Server, ServerOptions, Target,
    admit_with,
};

use super::{Ending, Keeper, has_ended};
use crate::map::device::Identity;
use crate::map::front_end::{FrontEnd, Progress};
use crate::map::locator::{Locator, target_of};
use crate::map::record::{self, Recorder};
use crate::signals::Interrupt;

const SIZE: u64 = 1 << 20;
const LINEAGE: u128 = 77;
const LIMIT: Duration = Duration::from_secs(20);

/// What a node says of `vol0`.
struct Says {
    serves: bool,
    size: u64,
    lineage: u128,
    primary: Option<String>,
    served: u64,
    /// The latest generation of a connection, and how often a later one came.
    generation: u64,
    successors: u64,
    /// Connections of that generation.
    connections: Vec<OwnedFd>,
}

/// A node that can be told what to say.
#[derive(Clone)]
struct Node(Arc<Mutex<Says>>);

impl Node {
    fn with<R>(&self, body: impl FnOnce(&mut Says) -> R) -> R {
        body(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Exports for Node {
    fn list(&self) -> Vec<String> {
        vec!["vol0".into()]
    }

    fn open(&self, name: &str) -> Result<ExportInfo, ExportRefusal> {
        self.with(|says| {
            if !says.serves {
                return Err(ExportRefusal::Policy("another node is primary".into()));
            }
            Ok(ExportInfo { lineage: Some(says.lineage), ..ExportInfo::new(name, says.size) })
        })
    }

    fn places(&self, _: &str) -> Result<Vec<Place>, ExportRefusal> {
        Ok(self
            .with(|says| says.primary.iter().map(|a| Place { address: a.clone(), primary: true }).collect()))
    }

    fn admit(&self, _: &str, _: Peer) -> Admitting {
        let node = self.clone();
        admit_with(move |connection| {
            let generation = connection.session.expect("a keeper has a client session").generation;
            node.with(|says| {
                says.served += 1;
                if generation > says.generation {
                    says.successors += 1;
                    says.generation = generation;
                    says.connections.clear();
                }
                if generation == says.generation {
                    says.connections.push(connection.fd);
                }
            });
        })
    }
}

/// Nodes, and where they listen.
struct Cluster {
    nodes: Vec<Node>,
    targets: Vec<Target>,
    servers: Vec<Server>,
    runtime: tokio::runtime::Runtime,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for server in std::mem::take(&mut self.servers) {
            self.runtime.block_on(server.stop());
        }
    }
}

impl Cluster {
    /// The first of them serves.
    fn new(count: usize) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let says = |serves| Says {
            serves,
            size: SIZE,
            lineage: LINEAGE,
            primary: None,
            served: 0,
            generation: 0,
            successors: 0,
            connections: Vec::new(),
        };
        let nodes: Vec<Node> = (0..count).map(|n| Node(Arc::new(Mutex::new(says(n == 0))))).collect();
        let listen = [ListenAddr::Tcp("127.0.0.1:0".parse().unwrap())];
        let start = |node: &Node| {
            runtime
                .block_on(Server::start(&listen, Arc::new(node.clone()), ServerOptions::default()))
                .unwrap()
        };
        let servers: Vec<Server> = nodes.iter().map(start).collect();
        let targets: Vec<Target> = servers.iter().map(address).collect();
        let cluster = Self { nodes, targets, servers, runtime };
        cluster.primary(0);
        cluster
    }

    /// From now on this one serves, and all say so.
    fn primary(&self, index: usize) {
        for (n, node) in self.nodes.iter().enumerate() {
            node.with(|says| {
                says.serves = n == index;
                says.primary = Some(self.targets[index].to_string());
            });
        }
    }

    fn served(&self) -> Vec<u64> {
        self.nodes.iter().map(|node| node.with(|says| says.served)).collect()
    }
}

fn address(server: &Server) -> Target {
    match &server.addrs()[0] {
        ListenAddr::Tcp(address) => target_of(&address.to_string()).unwrap(),
        ListenAddr::Unix(_) => unreachable!("it listens on TCP"),
    }
}

/// A device that is only counted.
struct Counted {
    identity: Identity,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    gone: bool,
    /// The connection that it has, while that lives.
    connection: Option<OwnedFd>,
    /// Deaths of connections that are still to be told.
    deaths: VecDeque<()>,
    replaced: Vec<Option<(u64, u32)>>,
    progress: Option<Progress>,
    looks: u32,
}

impl State {
    /// The connection ends, and the device notices at once.
    fn die(&mut self) {
        let connection = self.connection.take().expect("it has a connection");
        rustix::net::shutdown(&connection, rustix::net::Shutdown::Both).unwrap();
        self.deaths.push_back(());
    }
}

impl FrontEnd for Counted {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn is_there(&self) -> io::Result<bool> {
        let mut state = self.state.lock().unwrap();
        state.looks += 1;
        Ok(!state.gone)
    }

    fn progress(&self) -> Option<Progress> {
        self.state.lock().unwrap().progress
    }

    fn size(&self) -> Option<(u64, u32)> {
        Some((SIZE, 4096))
    }

    fn replace(&mut self, resize: Option<(u64, u32)>, connection: &OwnedFd) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        if state.connection.is_none() {
            state.connection = Some(connection.try_clone()?);
            state.replaced.push(resize);
        }
        Ok(())
    }

    fn wait_dead(&mut self, limit: Duration) -> io::Result<bool> {
        let mut state = self.state.lock().unwrap();
        // As the kernel, it notices the end of its connection by itself.
        if state.connection.as_ref().is_some_and(has_ended) {
            state.connection = None;
            state.deaths.push_back(());
        }
        if state.deaths.pop_front().is_some() {
            return Ok(true);
        }
        drop(state);
        thread::sleep(limit.min(Duration::from_millis(20)));
        Ok(false)
    }
}

/// A keeper at work on a device that it made on the first node, until `body` has seen enough.
fn with_keeper(cluster: &Cluster, body: impl FnOnce(&Mutex<State>, &std::path::Path)) -> Ending {
    with_keeper_of(cluster, true, body)
}

/// The same; where the device is not `new`, an earlier keeper made it, and has ended.
fn with_keeper_of(
    cluster: &Cluster,
    new: bool,
    body: impl FnOnce(&Mutex<State>, &std::path::Path),
) -> Ending {
    let dir = tempfile::tempdir().unwrap();
    let identity = Identity { volume: "vol0".into(), lineage: LINEAGE, session: 1 };
    let state = Arc::new(Mutex::new(State::default()));
    let mut front = Counted { identity, state: Arc::clone(&state) };
    let mut locator = Locator::new("vol0", 1, cluster.targets.clone());
    let mut recorder = Recorder::new(dir.path(), "vol0");
    let found = locator.find().unwrap();
    state.lock().unwrap().connection = Some(found.connection.try_clone().unwrap());
    thread::scope(|scope| {
        let keeping = scope.spawn(move || {
            let keeper = if new {
                Keeper::of_new(&mut front, locator, recorder, found)
            } else {
                recorder.connected(&found.target, found.called.as_ref());
                drop(found);
                Keeper::of_old(&mut front, locator, recorder)
            };
            keeper.keep(&Interrupt::default()).unwrap()
        });
        let seen = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| body(&state, dir.path())));
        state.lock().unwrap_or_else(PoisonError::into_inner).gone = true;
        let ending = keeping.join().unwrap();
        seen.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        ending
    })
}

fn eventually(what: &str, holds: impl Fn() -> bool) {
    let end = Instant::now() + LIMIT;
    while !holds() {
        assert!(Instant::now() < end, "never came true: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn replaced(state: &Mutex<State>) -> usize {
    state.lock().unwrap().replaced.len()
}

/// Waits until the keeper has looked at its device so many times more.
fn look_on(state: &Mutex<State>, times: u32) {
    let now = state.lock().unwrap().looks;
    eventually("the keeper looks on", || state.lock().unwrap().looks >= now + times);
}

#[test]
fn a_dead_connection_is_replaced_by_one_to_whoever_serves() {
    let cluster = Cluster::new(3);
    let ending = with_keeper(&cluster, |state, dir| {
        cluster.primary(2);
        state.lock().unwrap().die();
        eventually("it goes on at the third", || replaced(state) == 1);
        eventually("it says so", || {
            record::read(dir, "vol0").is_some_and(|r| r.primary == Some(cluster.targets[2].to_string()))
        });
        // An attempt of before may have come to the third when it served already.
        let served = cluster.served();
        assert!(served[..2] == [1, 0] && served[2] >= 1, "{served:?}");
        assert_eq!(state.lock().unwrap().replaced, [None], "its size is what it was");
    });
    assert_eq!(ending, Ending::Unmapped);
}

#[test]
fn a_node_with_two_addresses_does_not_replace_its_own_connection() {
    let mut cluster = Cluster::new(1);
    let listen = [ListenAddr::Tcp("127.0.0.1:0".parse().unwrap())];
    let node = Arc::new(cluster.nodes[0].clone());
    let server = cluster.runtime.block_on(Server::start(&listen, node, ServerOptions::default())).unwrap();
    cluster.targets.push(address(&server));
    cluster.servers.push(server);
    with_keeper(&cluster, |state, _| {
        eventually("it is reached by both", || cluster.served() == [2]);
        state.lock().unwrap().die();
        eventually("it goes on", || replaced(state) == 1);
        look_on(state, 3);
        assert_eq!(replaced(state), 1);
        assert_eq!(cluster.nodes[0].with(|says| says.successors), 2, "one at first, and one for the death");
    });
}

#[test]
fn a_device_of_an_earlier_keeper_gets_a_connection_that_can_be_looked_at() {
    // Nothing is in flight, and nobody tells of a death: it may have been told to the earlier one.
    for dies in [false, true] {
        let cluster = Cluster::new(1);
        with_keeper_of(&cluster, false, |state, _| {
            if dies {
                state.lock().unwrap().connection = None;
            }
            eventually("it gets another one", || replaced(state) == 1);
            look_on(state, 3);
            assert_eq!((replaced(state), cluster.served()), (1, vec![2]));
        });
    }
}

#[test]
fn a_death_that_is_told_late_ends_no_connection() {
    let cluster = Cluster::new(1);
    with_keeper(&cluster, |state, _| {
        state.lock().unwrap().die();
        eventually("it goes on", || replaced(state) == 1);
        state.lock().unwrap().deaths.push_back(());
        look_on(state, 3);
        assert_eq!((replaced(state), cluster.served()), (1, vec![2]));
    });
}

#[test]
fn a_device_that_noticed_a_death_too_late_gets_the_connection_again() {
    let cluster = Cluster::new(1);
    with_keeper(&cluster, |state, _| {
        state.lock().unwrap().die();
        eventually("it goes on", || replaced(state) == 1);
        {
            // It took no notice of the connection that it was given: its old one had not died for it.
            state.lock().unwrap().connection = None;
        }
        eventually("it is given to it again", || replaced(state) == 2);
        look_on(state, 3);
        assert_eq!((replaced(state), cluster.served()), (2, vec![2]), "and no other one");
    });
}

#[test]
fn a_primary_that_is_one_no_more_is_left_without_a_word_of_its_own() {
    let cluster = Cluster::new(2);
    with_keeper(&cluster, |state, _| {
        look_on(state, 3);
        assert_eq!(replaced(state), 0, "nothing is amiss");
        cluster.primary(1);
        eventually("it goes on at the second", || replaced(state) == 1);
        look_on(state, 3);
        assert_eq!((replaced(state), cluster.served()), (1, vec![1, 1]), "and stays there");
    });
}

#[test]
fn one_node_that_is_behind_moves_nobody() {
    let cluster = Cluster::new(3);
    with_keeper(&cluster, |state, _| {
        let other = cluster.targets[1].to_string();
        cluster.nodes[2].with(|says| says.primary = Some(other));
        look_on(state, 8);
        assert_eq!(replaced(state), 0);
    });
}

#[test]
fn a_device_that_does_not_go_on_gets_a_new_connection_and_a_slow_primary_some_time() {
    let cluster = Cluster::new(1);
    with_keeper(&cluster, |state, _| {
        state.lock().unwrap().progress = Some(Progress { done: 5, in_flight: 1 });
        eventually("a new connection", || replaced(state) == 1);
        state.lock().unwrap().progress = Some(Progress { done: 6, in_flight: 0 });
        look_on(state, 4);
        assert_eq!(replaced(state), 1, "nothing is in flight");
    });
}

#[test]
fn another_lineage_is_not_gone_on_with() {
    let cluster = Cluster::new(1);
    with_keeper(&cluster, |state, dir| {
        cluster.nodes[0].with(|says| says.lineage += 1);
        state.lock().unwrap().die();
        eventually("it says why", || {
            record::read(dir, "vol0")
                .and_then(|r| r.waiting)
                .is_some_and(|why| why.contains("another lineage"))
        });
        look_on(state, 3);
        assert_eq!(replaced(state), 0);
        cluster.nodes[0].with(|says| says.lineage = LINEAGE);
        eventually("its own is", || replaced(state) == 1);
    });
}

#[test]
fn a_smaller_volume_is_refused_and_a_larger_one_is_taken() {
    let cluster = Cluster::new(1);
    with_keeper(&cluster, |state, dir| {
        cluster.nodes[0].with(|says| says.size = SIZE - 4096);
        state.lock().unwrap().die();
        eventually("it says why", || {
            record::read(dir, "vol0").and_then(|r| r.waiting).is_some_and(|why| why.contains("bytes of it"))
        });
        assert_eq!(replaced(state), 0);
        cluster.nodes[0].with(|says| says.size = SIZE + 8192 + 100);
        eventually("the larger one is", || replaced(state) == 1);
        assert_eq!(state.lock().unwrap().replaced, [Some((SIZE + 8192, 4096))], "in whole blocks");
    });
}

#[test]
fn nodes_that_are_gone_are_waited_for() {
    let cluster = Cluster::new(1);
    with_keeper(&cluster, |state, dir| {
        cluster.nodes[0].with(|says| says.serves = false);
        state.lock().unwrap().die();
        eventually("it says that it waits", || {
            record::read(dir, "vol0").is_some_and(|r| r.waiting.is_some())
        });
        assert_eq!(replaced(state), 0);
        cluster.nodes[0].with(|says| says.serves = true);
        eventually("it goes on", || replaced(state) == 1);
        let record = record::read(dir, "vol0").unwrap();
        assert_eq!(record.waiting, None);
    });
}
