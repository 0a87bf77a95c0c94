//! Sessions to the other replicas: frames in, frames out.
//!
//! A frame's header is checked before its lengths are believed; block content lands in an aligned buffer
//! of its own, and no message reaches the core unless header and body checksums hold. A frame that does
//! not hold ends its session: nothing after it can be trusted.
//!
//! Invariants: at most one session per node; a new one ends the old one before it delivers anything.
//!
//! Never does: opening connections or greeting (done before the socket is handed over), or bounding what
//! is sent (the core's).

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use crate::types::{BlockRange, Geometry, Incarnation, NodeId};
use crate::wire::{
    Body, BodyLen, BufId, FRAME_HEADER_LEN, FrameHeader, Payload, PeerMsg, SessionId, decode_header, encode,
};

use super::outgoing::{Message, Outgoing};
use super::ring::{Io, Span, Token};
use super::staging::{STAGING_LEN, Staging};

/// What a session is in the middle of receiving.
enum State {
    /// A header.
    Header,
    /// The inline body of a frame, as far as it is here.
    Inline { header: FrameHeader, len: usize, bytes: Vec<u8> },
    /// Block content: `got` bytes of it are in `buf`.
    Bulk { header: FrameHeader, buf: BufId, len: usize, got: usize },
}

struct Session {
    node: NodeId,
    incarnation: Incarnation,
    socket: Rc<OwnedFd>,
    staging: Staging,
    state: State,
    receiving: bool,
    /// The last receive left something in the socket.
    more: bool,
    outgoing: Outgoing,
    /// It is among those with something to send.
    listed: bool,
}

/// All sessions of one volume.
pub(super) struct Peers {
    geometry: Geometry,
    sessions: BTreeMap<SessionId, Session>,
    next_session: u64,
    /// Sessions with something to send, each once; some may be over by now.
    to_flush: Vec<SessionId>,
}

impl Peers {
    /// None yet.
    pub(super) fn new(geometry: Geometry) -> Self {
        Self { geometry, sessions: BTreeMap::new(), next_session: 1, to_flush: Vec::new() }
    }

    /// The session to a node.
    pub(super) fn session_to(&self, node: NodeId) -> Option<SessionId> {
        self.sessions.iter().find(|(_, s)| s.node == node).map(|(id, _)| *id)
    }

    /// The peer's run at the other end of a session.
    pub(super) fn incarnation(&self, session: SessionId) -> Option<Incarnation> {
        self.sessions.get(&session).map(|s| s.incarnation)
    }

    /// True while the session is open.
    pub(super) fn is_open(&self, session: SessionId) -> bool {
        self.sessions.contains_key(&session)
    }

    /// The open sessions.
    pub(super) fn all(&self) -> Vec<SessionId> {
        self.sessions.keys().copied().collect()
    }

    /// Takes over a greeted connection. There must be no session to that node.
    pub(super) fn add(
        &mut self,
        io: &mut Io,
        node: NodeId,
        incarnation: Incarnation,
        socket: OwnedFd,
    ) -> SessionId {
        assert!(self.session_to(node).is_none(), "the old session to {node} ends before the new one begins");
        let session = SessionId(self.next_session);
        self.next_session += 1;
        let staging = Staging::new(&mut io.buffers);
        let entry = Session {
            node,
            incarnation,
            socket: Rc::new(socket),
            staging,
            state: State::Header,
            receiving: false,
            more: true,
            outgoing: Outgoing::new(),
            listed: false,
        };
        self.sessions.insert(session, entry);
        session
    }

    /// Ends a session; what it received and was not delivered is dropped. Returns its node, `None` if it
    /// is not open.
    pub(super) fn close(&mut self, io: &mut Io, session: SessionId) -> Option<NodeId> {
        let mut entry = self.sessions.remove(&session)?;
        let buffers = &mut *io.buffers;
        entry.outgoing.abandon(buffers);
        if let State::Bulk { buf, .. } = entry.state {
            buffers.release(buf);
        }
        entry.staging.release(buffers);
        // Whatever the kernel has of this socket ends now; it may have failed already.
        let _failed = rustix::net::shutdown(&*entry.socket, rustix::net::Shutdown::Both);
        Some(entry.node)
    }

    /// Takes what a receive brought. The caller then asks [`Self::next`].
    ///
    /// # Errors
    /// The reason for which the session is to be ended.
    pub(super) fn received(
        &mut self,
        session: SessionId,
        buf: BufId,
        result: i32,
        more: bool,
    ) -> Result<(), String> {
        let Some(entry) = self.sessions.get_mut(&session) else { return Ok(()) };
        (entry.receiving, entry.more) = (false, more);
        let len = match usize::try_from(result) {
            Ok(0) => return Err("the peer closed the connection".into()),
            Ok(len) => len,
            Err(_) if matches!(-result, libc::EINTR | libc::EAGAIN) => return Ok(()),
            Err(_) => {
                return Err(format!("receiving failed: {}", std::io::Error::from_raw_os_error(-result)));
            }
        };
        if entry.staging.is(buf) {
            entry.staging.filled(len);
        } else if let State::Bulk { got, .. } = &mut entry.state {
            *got += len;
        }
        Ok(())
    }

    /// The next message that is here whole.
    ///
    /// # Errors
    /// The reason for which the session is to be ended.
    pub(super) fn next(&mut self, io: &mut Io, session: SessionId) -> Result<Option<PeerMsg>, String> {
        let Some(entry) = self.sessions.get_mut(&session) else { return Ok(None) };
        let Some(message) = entry.next(io)? else { return Ok(None) };
        match blocks_of(&message) {
            Some(blocks) if !self.geometry.contains_blocks(blocks) => {
                if let Some(buf) = content_of(&message) {
                    io.buffers.release(buf);
                }
                Err(format!(
                    "the peer names blocks {} to {} of a volume of {} blocks: it has another size in mind; \
                     compare `blkrepl volume show` on both nodes",
                    blocks.start.0,
                    blocks.start.0 + blocks.count,
                    self.geometry.blocks()
                ))
            }
            _ => Ok(Some(message)),
        }
    }

    /// Queues a message. Dropped if the session is over.
    pub(super) fn send(&mut self, io: &mut Io, session: SessionId, message: &PeerMsg) {
        let Some(entry) = self.sessions.get_mut(&session) else { return };
        if let Some(payload) = entry.outgoing.push_head(|out| encode(message, out)) {
            entry.outgoing.push_buffer(&mut io.buffers, payload.buf, 0, payload.len as usize);
        }
        entry.list(session, &mut self.to_flush);
    }

    /// Takes back what a send left of its message.
    ///
    /// # Errors
    /// The reason for which the session is to be ended.
    pub(super) fn sent(
        &mut self,
        io: &mut Io,
        session: SessionId,
        mut message: Box<Message>,
        result: i32,
    ) -> Result<(), String> {
        let Some(entry) = self.sessions.get_mut(&session) else {
            message.abandon(&mut io.buffers);
            return Ok(());
        };
        let len = match usize::try_from(result) {
            Ok(len) => len,
            Err(_) if matches!(-result, libc::EINTR | libc::EAGAIN) => 0,
            Err(_) => {
                message.abandon(&mut io.buffers);
                return Err(format!("sending failed: {}", std::io::Error::from_raw_os_error(-result)));
            }
        };
        match entry.outgoing.on_sent(message, len, &mut io.buffers).rest {
            Some(rest) => io.send(&entry.socket, rest, Token::PeerSend(session)),
            None => {
                entry.list(session, &mut self.to_flush);
            }
        }
        Ok(())
    }

    /// Hands the gathered frames to the kernel. Returns how many completions will come of that at once, and
    /// lead to nothing but memory given back.
    pub(super) fn flush(&mut self, io: &mut Io) -> usize {
        let mut quiet = 0;
        for session in self.to_flush.drain(..) {
            let Some(entry) = self.sessions.get_mut(&session) else { continue };
            entry.listed = false;
            if let Some(message) = entry.outgoing.take() {
                quiet += usize::from(message.leaves_at_once());
                io.send(&entry.socket, message, Token::PeerSend(session));
            }
        }
        quiet
    }

    /// Reads on.
    pub(super) fn arm(&mut self, io: &mut Io, session: SessionId) {
        let Some(entry) = self.sessions.get_mut(&session) else { return };
        if entry.receiving {
            return;
        }
        entry.receiving = true;
        let span = match entry.state {
            State::Bulk { buf, len, got, .. } if entry.staging.bypass(len - got) => {
                Span { buf, start: got, len: len - got }
            }
            _ => entry.staging.room(&mut io.buffers, STAGING_LEN),
        };
        io.receive(&entry.socket, span, !entry.more, Token::PeerReceive(session));
    }

    /// Nothing is left to send.
    pub(super) fn is_idle(&self) -> bool {
        self.sessions.values().all(|s| s.outgoing.is_idle())
    }
}

impl Session {
    /// Puts it on the list of those with something to send.
    fn list(&mut self, session: SessionId, to_flush: &mut Vec<SessionId>) {
        if !std::mem::replace(&mut self.listed, true) {
            to_flush.push(session);
        }
    }

    fn next(&mut self, io: &mut Io) -> Result<Option<PeerMsg>, String> {
        if matches!(self.state, State::Header) && !self.parse_header(io)? {
            return Ok(None);
        }
        let whole = match &mut self.state {
            State::Header => true,
            State::Inline { len, bytes, .. } => {
                let staged = self.staging.bytes(&io.buffers);
                let now = (*len - bytes.len()).min(staged.len());
                bytes.extend_from_slice(&staged[..now]);
                self.staging.consume(now);
                bytes.len() == *len
            }
            State::Bulk { buf, len, got, .. } => {
                *got += self.staging.move_to(&mut io.buffers, *len - *got, *buf, *got);
                got == len
            }
        };
        if !whole {
            return Ok(None);
        }
        let (header, body, buf) = match std::mem::replace(&mut self.state, State::Header) {
            State::Header => return Ok(None),
            State::Inline { header, bytes, .. } => {
                let body = if bytes.is_empty() { Body::None } else { Body::Inline(bytes) };
                (header, body, None)
            }
            State::Bulk { header, buf, len, .. } => {
                let crc = crc32fast::hash(&io.buffers.bytes(buf)[..len]);
                let len = u32::try_from(len).expect("the header bounds the content to one payload");
                (header, Body::Bulk(Payload { buf, len, crc }), Some(buf))
            }
        };
        header.into_message(body).map(Some).map_err(|error| {
            if let Some(buf) = buf {
                io.buffers.release(buf);
            }
            error.to_string()
        })
    }

    /// Reads a header, if it is there whole, and prepares for its body. A frame without one becomes an
    /// empty inline body.
    fn parse_header(&mut self, io: &mut Io) -> Result<bool, String> {
        let Some(bytes) = self.staging.bytes(&io.buffers).first_chunk::<FRAME_HEADER_LEN>() else {
            return Ok(false);
        };
        let header = decode_header(bytes).map_err(|error| error.to_string())?;
        self.staging.consume(FRAME_HEADER_LEN);
        self.state = match header.body_len() {
            BodyLen::None => State::Inline { header, len: 0, bytes: Vec::new() },
            BodyLen::Inline(len) => State::Inline { header, len: len as usize, bytes: Vec::new() },
            BodyLen::Bulk(len) => {
                let len = len as usize;
                self.staging.expect_body(len);
                State::Bulk { header, buf: io.buffers.alloc(len), len, got: 0 }
            }
        };
        Ok(true)
    }
}

/// The blocks that a message names.
fn blocks_of(message: &PeerMsg) -> Option<BlockRange> {
    match message {
        PeerMsg::Write { blocks, .. }
        | PeerMsg::Zero { blocks, .. }
        | PeerMsg::Compare { blocks, .. }
        | PeerMsg::Copy { blocks, .. }
        | PeerMsg::CopyZero { blocks, .. }
        | PeerMsg::ReadRequest { blocks, .. } => Some(*blocks),
        _ => None,
    }
}

/// The buffer that a message brings.
pub(super) fn content_of(message: &PeerMsg) -> Option<BufId> {
    match message {
        PeerMsg::Write { payload, .. } | PeerMsg::Copy { payload, .. } => Some(payload.buf),
        PeerMsg::ReadReply { payload, .. } => payload.as_ref().map(|p| p.buf),
        _ => None,
    }
}
