//! Streams between processes, as TCP gives them: in order, whole, or broken.
//!
//! Every direction between two nodes is a link with its own delay, loss (which delays further, as a repeated
//! packet does) and damage; a link that is cut holds everything until it heals, so a cut one way is a peer that
//! hears and is not heard. Streams end by a close, by a reset, or not at all: a machine without power answers
//! nothing. A damaged segment is one that TCP's own checksum did not catch.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use blkrepl_engine::control::{Listener, Pending, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::clock::{MS, Time, US};
use crate::rng::Rng;

use super::host::{Now, lock};

/// How long a lost segment is late: the shortest repetition of TCP.
const REPEAT: Time = 200 * MS;
/// Bytes that a stream takes before the other side has taken them.
const WINDOW: usize = 256 << 10;

/// One direction between two nodes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Link {
    /// Shortest delay.
    pub(crate) delay_min: Time,
    /// Longest delay.
    pub(crate) delay_max: Time,
    /// Lost segments per thousand.
    pub(crate) loss: u64,
    /// Damaged segments per million.
    pub(crate) damage: u64,
    /// Nothing passes.
    pub(crate) cut: bool,
}

impl Default for Link {
    fn default() -> Self {
        Self { delay_min: 50 * US, delay_max: 500 * US, loss: 0, damage: 0, cut: false }
    }
}

/// Names one end of a stream; the other end is the number with the last bit turned.
type End = u64;

struct Ended {
    node: u64,
    peer: u64,
    inbox: VecDeque<u8>,
    /// Sent and not yet arrived.
    under_way: usize,
    eof: bool,
    broken: Option<io::ErrorKind>,
    connected: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
    /// When the last segment of this end arrives; none overtakes it.
    last: Time,
}

enum What {
    /// A connection to `end`'s node.
    Open,
    Accepted,
    Refused,
    Data(Vec<u8>),
    Close,
    Reset,
}

struct Event {
    from: u64,
    to: u64,
    end: End,
    what: What,
}

#[derive(Default)]
struct Accept {
    waiting: VecDeque<(End, u64)>,
    waker: Option<Waker>,
}

struct State {
    rng: Rng,
    next: u64,
    links: BTreeMap<(u64, u64), Link>,
    listeners: BTreeMap<u64, Accept>,
    /// Machines that have power.
    powered: BTreeMap<u64, bool>,
    ends: BTreeMap<End, Ended>,
    events: BTreeMap<(Time, u64), Event>,
    held: BTreeMap<(u64, u64), VecDeque<Event>>,
    hash: u64,
}

/// The network.
#[derive(Clone)]
pub(crate) struct Net {
    now: Now,
    state: Arc<Mutex<State>>,
}

impl Net {
    pub(crate) fn new(now: Now, rng: Rng) -> Self {
        let state = State {
            rng,
            next: 0,
            links: BTreeMap::new(),
            listeners: BTreeMap::new(),
            powered: BTreeMap::new(),
            ends: BTreeMap::new(),
            events: BTreeMap::new(),
            held: BTreeMap::new(),
            hash: 0xcbf2_9ce4_8422_2325,
        };
        Self { now, state: Arc::new(Mutex::new(state)) }
    }

    /// Hash of everything that was delivered.
    pub(crate) fn hash(&self) -> u64 {
        lock(&self.state).hash
    }

    pub(crate) fn link(&self, from: u64, to: u64) -> Link {
        lock(&self.state).links.get(&(from, to)).copied().unwrap_or_default()
    }

    /// Changes a link. What a cut held back comes once it is healed, after a repetition.
    pub(crate) fn set_link(&self, from: u64, to: u64, link: Link) {
        let mut s = lock(&self.state);
        s.links.insert((from, to), link);
        if !link.cut {
            let held = s.held.remove(&(from, to)).unwrap_or_default();
            // Nothing that is sent from here on overtakes it.
            let again = self.now.get() + s.rng.between(MS, 2 * REPEAT);
            for end in s.ends.values_mut().filter(|e| (e.node, e.peer) == (from, to)) {
                end.last = end.last.max(again);
            }
            for event in held {
                s.schedule(again, event);
            }
        }
    }

    pub(crate) fn set_power(&self, node: u64, on: bool) {
        lock(&self.state).powered.insert(node, on);
    }

    /// The process is gone. With power its kernel closes its streams; without, they end for nobody.
    pub(crate) fn drop_process(&self, node: u64, powered: bool) {
        let mut s = lock(&self.state);
        s.listeners.remove(&node);
        let mine: Vec<End> = s.ends.iter().filter(|(_, e)| e.node == node).map(|(id, _)| *id).collect();
        for end in mine {
            if powered {
                s.send(self.now.get(), end, What::Reset);
            }
            s.ends.remove(&end);
        }
        drop(s);
        self.set_power(node, powered);
    }

    /// Breaks all streams between two nodes.
    pub(crate) fn reset(&self, a: u64, b: u64) {
        let mut wakers = Vec::new();
        let mut s = lock(&self.state);
        for end in s.ends.values_mut().filter(|e| (e.node, e.peer) == (a, b) || (e.node, e.peer) == (b, a)) {
            end.broken.get_or_insert(io::ErrorKind::ConnectionReset);
            wakers.extend(end.reader.take().into_iter().chain(end.writer.take()));
        }
        drop(s);
        wakers.into_iter().for_each(Waker::wake);
    }

    pub(crate) fn next_event(&self) -> Option<Time> {
        lock(&self.state).events.keys().next().map(|(at, _)| *at)
    }

    /// Delivers the first event if it is due.
    pub(crate) fn deliver(&self) {
        let now = self.now.get();
        let wakers = {
            let mut s = lock(&self.state);
            match s.events.first_key_value() {
                Some(((at, _), _)) if *at <= now => {}
                _ => return,
            }
            let Some((_, event)) = s.events.pop_first() else { return };
            s.arrive(now, event)
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Connects `from` to the node that the address names.
    pub(crate) fn connect(&self, from: u64, addr: &str) -> Pending<'static, io::Result<Box<dyn Stream>>> {
        let net = self.clone();
        let to = node_of(addr);
        Box::pin(async move {
            let to = to.ok_or(io::ErrorKind::AddrNotAvailable)?;
            let end = {
                let mut s = lock(&net.state);
                let end = s.next * 2;
                s.next += 1;
                s.ends.insert(end, Ended::new(from, to));
                s.send(net.now.get(), end, What::Open);
                end
            };
            let stream = SimStream { net, end };
            std::future::poll_fn(|cx| stream.poll_connected(cx)).await?;
            Ok(Box::new(stream) as Box<dyn Stream>)
        })
    }

    /// Listens on a node.
    pub(crate) fn listen(&self, node: u64) -> Box<dyn Listener> {
        let mut s = lock(&self.state);
        s.listeners.insert(node, Accept::default());
        s.powered.insert(node, true);
        drop(s);
        Box::new(SimListener { net: self.clone(), node })
    }
}

/// The address of a node's control plane.
pub(crate) fn addr_of(node: u64) -> String {
    format!("node-{node}:7000")
}

fn node_of(addr: &str) -> Option<u64> {
    addr.strip_prefix("node-")?.strip_suffix(":7000")?.parse().ok()
}

impl Ended {
    fn new(node: u64, peer: u64) -> Self {
        Self {
            node,
            peer,
            inbox: VecDeque::new(),
            under_way: 0,
            eof: false,
            broken: None,
            connected: false,
            reader: None,
            writer: None,
            last: 0,
        }
    }

    fn wakers(&mut self) -> Vec<Waker> {
        self.reader.take().into_iter().chain(self.writer.take()).collect()
    }
}

impl State {
    fn schedule(&mut self, at: Time, event: Event) {
        let number = self.next;
        self.next += 1;
        self.events.insert((at, number), event);
    }

    /// Sends from one end to the other, behind what that end sent before.
    fn send(&mut self, now: Time, from_end: End, what: What) {
        let Some(end) = self.ends.get(&from_end) else { return };
        let (from, to, last) = (end.node, end.peer, end.last);
        let link = self.links.get(&(from, to)).copied().unwrap_or_default();
        let mut delay = self.rng.skewed(link.delay_min.max(1), link.delay_max.max(link.delay_min + 1));
        for _ in 0..4 {
            if self.rng.chance(link.loss) {
                delay += REPEAT;
            }
        }
        let at = (now + delay).max(last + 1);
        if let Some(end) = self.ends.get_mut(&from_end) {
            end.last = at;
        }
        self.schedule(at, Event { from, to, end: from_end ^ 1, what });
    }

    fn arrive(&mut self, now: Time, event: Event) -> Vec<Waker> {
        let Event { from, to, end, mut what } = event;
        let link = self.links.get(&(from, to)).copied().unwrap_or_default();
        if link.cut {
            self.held.entry((from, to)).or_default().push_back(Event { from, to, end, what });
            return Vec::new();
        }
        if !self.powered.get(&to).copied().unwrap_or(false) {
            return Vec::new();
        }
        if let What::Data(bytes) = &mut what
            && !bytes.is_empty()
            && self.rng.rare(link.damage)
        {
            let len = bytes.len() as u64;
            if self.rng.chance(500) {
                let at = usize::try_from(self.rng.below(len)).unwrap_or(0);
                bytes[at] ^= 1 << self.rng.below(8);
            } else {
                bytes.truncate(usize::try_from(self.rng.below(len)).unwrap_or(0));
            }
        }
        self.note(now, end, &what);
        match what {
            What::Open => self.open(now, from, to, end),
            What::Accepted => self.change(end, |e| e.connected = true),
            What::Refused => self.change(end, |e| e.broken = Some(io::ErrorKind::ConnectionRefused)),
            What::Data(bytes) => {
                if let Some(sender) = self.ends.get_mut(&(end ^ 1)) {
                    sender.under_way = sender.under_way.saturating_sub(bytes.len());
                }
                if !self.ends.contains_key(&end) {
                    // Nobody has that stream any more; the kernel says so.
                    self.answer_reset(now, from, to, end ^ 1);
                    return Vec::new();
                }
                let mut wakers = self.change(end, |e| e.inbox.extend(bytes));
                wakers.extend(self.change(end ^ 1, |_| {}));
                wakers
            }
            What::Close => self.change(end, |e| e.eof = true),
            What::Reset => self.change(end, |e| {
                e.broken.get_or_insert(io::ErrorKind::ConnectionReset);
            }),
        }
    }

    fn open(&mut self, now: Time, from: u64, to: u64, end: End) -> Vec<Waker> {
        let accept = self.listeners.get_mut(&to);
        let Some(accept) = accept else {
            let at = now + self.back(to, from);
            self.schedule(at, Event { from: to, to: from, end: end ^ 1, what: What::Refused });
            return Vec::new();
        };
        accept.waiting.push_back((end, from));
        let waker = accept.waker.take();
        let mut new = Ended::new(to, from);
        new.connected = true;
        self.ends.insert(end, new);
        self.send(now, end, What::Accepted);
        waker.into_iter().collect()
    }

    fn answer_reset(&mut self, now: Time, from: u64, to: u64, end: End) {
        let at = now + self.back(to, from);
        self.schedule(at, Event { from: to, to: from, end, what: What::Reset });
    }

    fn back(&mut self, from: u64, to: u64) -> Time {
        let link = self.links.get(&(from, to)).copied().unwrap_or_default();
        self.rng.skewed(link.delay_min.max(1), link.delay_max.max(link.delay_min + 1))
    }

    fn change(&mut self, end: End, change: impl FnOnce(&mut Ended)) -> Vec<Waker> {
        let Some(end) = self.ends.get_mut(&end) else { return Vec::new() };
        change(end);
        end.wakers()
    }

    fn note(&mut self, now: Time, end: End, what: &What) {
        let kind = match what {
            What::Open => 1,
            What::Accepted => 2,
            What::Refused => 3,
            What::Data(bytes) => {
                bytes.iter().fold(4, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
            }
            What::Close => 5,
            What::Reset => 6,
        };
        for part in [now, end, kind] {
            self.hash = (self.hash ^ part).wrapping_mul(0x100_0000_01b3);
        }
    }
}

struct SimListener {
    net: Net,
    node: u64,
}

impl Listener for SimListener {
    fn accept(&mut self) -> Pending<'_, io::Result<(Box<dyn Stream>, String)>> {
        Box::pin(std::future::poll_fn(|cx| {
            let mut s = lock(&self.net.state);
            let Some(accept) = s.listeners.get_mut(&self.node) else {
                return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
            };
            let Some((end, from)) = accept.waiting.pop_front() else {
                accept.waker = Some(cx.waker().clone());
                return Poll::Pending;
            };
            drop(s);
            let stream = SimStream { net: self.net.clone(), end };
            Poll::Ready(Ok((Box::new(stream) as Box<dyn Stream>, addr_of(from))))
        }))
    }
}

/// One end of a stream, as its process holds it.
struct SimStream {
    net: Net,
    end: End,
}

impl SimStream {
    fn poll_connected(&self, cx: &Context<'_>) -> Poll<io::Result<()>> {
        let mut s = lock(&self.net.state);
        let Some(end) = s.ends.get_mut(&self.end) else {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        };
        if let Some(kind) = end.broken {
            return Poll::Ready(Err(kind.into()));
        }
        if end.connected {
            return Poll::Ready(Ok(()));
        }
        end.reader = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl AsyncRead for SimStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut guard = lock(&self.net.state);
        let s = &mut *guard;
        let Some(end) = s.ends.get_mut(&self.end) else {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        };
        if let Some(kind) = end.broken {
            return Poll::Ready(Err(kind.into()));
        }
        if !end.inbox.is_empty() {
            // Sometimes in pieces, as the kernel likes.
            let most = end.inbox.len().min(out.remaining());
            let take = if s.rng.chance(50) { (most / 2).max(1) } else { most };
            for byte in end.inbox.drain(..take) {
                out.put_slice(&[byte]);
            }
            return Poll::Ready(Ok(()));
        }
        if end.eof {
            return Poll::Ready(Ok(()));
        }
        end.reader = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl AsyncWrite for SimStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let mut s = lock(&self.net.state);
        let now = self.net.now.get();
        let Some(end) = s.ends.get_mut(&self.end) else {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        };
        if let Some(kind) = end.broken {
            return Poll::Ready(Err(kind.into()));
        }
        if end.under_way >= WINDOW {
            end.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        end.under_way += data.len();
        s.send(now, self.end, What::Data(data.to_vec()));
        Poll::Ready(Ok(data.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let now = self.net.now.get();
        lock(&self.net.state).send(now, self.end, What::Close);
        Poll::Ready(Ok(()))
    }
}

impl Drop for SimStream {
    fn drop(&mut self) {
        let now = self.net.now.get();
        let mut s = lock(&self.net.state);
        s.send(now, self.end, What::Close);
        s.ends.remove(&self.end);
    }
}
