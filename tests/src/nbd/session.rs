//! The transmission phase: requests as a test wants them, replies judged by every rule that can be judged from
//! the stream alone. What a request should bring is the test's own affair.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::options::judge_string;
use super::spec::*;
use super::wire::{Wire, broken};

/// Longest wait for a reply.
const LIMIT: Duration = Duration::from_secs(40);

/// What replies were agreed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Simple ones.
    Simple,
    /// Chunks.
    Structured,
    /// Chunks with extended headers.
    Extended,
}

impl Form {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Simple, Self::Structured, Self::Extended];

    /// Whether replies come in chunks.
    #[must_use]
    pub fn chunks(self) -> bool {
        self != Self::Simple
    }
}

/// A request, right or wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Command flags.
    pub flags: u16,
    /// Command.
    pub command: u16,
    /// The client's name for it.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes; cut to 32 bits where the header has no more.
    pub len: u64,
    /// What follows the header.
    pub payload: Vec<u8>,
}

impl Request {
    /// One without payload.
    #[must_use]
    pub fn new(command: u16, flags: u16, offset: u64, len: u64) -> Self {
        Self { flags, command, cookie: 0, offset, len, payload: Vec::new() }
    }

    /// A write as that form wants it.
    #[must_use]
    pub fn write(form: Form, offset: u64, data: &[u8]) -> Self {
        let flags = if form == Form::Extended { NBD_CMD_FLAG_PAYLOAD_LEN } else { 0 };
        Self { payload: data.to_vec(), ..Self::new(NBD_CMD_WRITE, flags, offset, data.len() as u64) }
    }

    /// The same with that cookie.
    #[must_use]
    pub fn named(mut self, cookie: u64) -> Self {
        self.cookie = cookie;
        self
    }

    /// The same with more flags.
    #[must_use]
    pub fn flagged(mut self, flags: u16) -> Self {
        self.flags |= flags;
        self
    }

    /// The same without its payload, for messages.
    fn head(&self) -> Self {
        Self::new(self.command, self.flags, self.offset, self.len)
    }

    /// As it goes over the wire.
    #[must_use]
    pub fn bytes(&self, form: Form) -> Vec<u8> {
        let magic = if form == Form::Extended { NBD_EXTENDED_REQUEST_MAGIC } else { NBD_REQUEST_MAGIC };
        let mut out = Vec::with_capacity(32 + self.payload.len());
        out.extend_from_slice(&magic.to_be_bytes());
        out.extend_from_slice(&self.flags.to_be_bytes());
        out.extend_from_slice(&self.command.to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
        out.extend_from_slice(&self.offset.to_be_bytes());
        let len = self.len.to_be_bytes();
        out.extend_from_slice(if form == Form::Extended { &len } else { &len[4..] });
        out.extend_from_slice(&self.payload);
        out
    }
}

/// A whole reply.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    /// The request's cookie.
    pub cookie: u64,
    /// Its error, 0 if there is none.
    pub error: u32,
    /// Data of a read.
    pub data: Vec<u8>,
    /// Content chunks that the data came in; 0 of a simple reply.
    pub pieces: usize,
    /// Block status: number of a context, with lengths and states.
    pub status: Vec<(u32, Vec<(u64, u64)>)>,
}

/// A request whose reply is not whole.
struct Pending {
    command: u16,
    flags: u16,
    offset: u64,
    len: u64,
    /// Bytes of a read that have come.
    covered: u64,
    reply: Reply,
}

/// A connection in its transmission phase.
pub struct Session {
    /// The connection, for what has no function here.
    pub wire: Wire,
    form: Form,
    pending: HashMap<u64, VecDeque<Pending>>,
    next_cookie: u64,
}

impl Session {
    /// Goes on with a connection whose handshake is over.
    #[must_use]
    pub fn new(wire: Wire, form: Form) -> Self {
        // High bits set, so that a server that cuts cookies is found.
        Self { wire, form, pending: HashMap::new(), next_cookie: 0xfedc_ba98_0000_0000 }
    }

    /// The form of its replies.
    #[must_use]
    pub fn form(&self) -> Form {
        self.form
    }

    /// Requests without a whole reply.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.pending.values().map(VecDeque::len).sum()
    }

    /// Sends a request under its own cookie.
    ///
    /// # Errors
    /// If the connection is closed.
    pub fn send(&mut self, request: &Request) -> Result<()> {
        let bytes = self.note(request);
        self.wire.send(&bytes)
    }

    /// Expects the reply to a request that the caller sends himself; its bytes.
    pub fn note(&mut self, request: &Request) -> Vec<u8> {
        let Request { flags, command, cookie, offset, len, .. } = *request;
        if command != NBD_CMD_DISC {
            let len = if self.form == Form::Extended { len } else { len & 0xffff_ffff };
            let reply = Reply { cookie, ..Reply::default() };
            let pending = Pending { command, flags, offset, len, covered: 0, reply };
            self.pending.entry(cookie).or_default().push_back(pending);
        }
        request.bytes(self.form)
    }

    /// Sends a request under a cookie of its own, and takes the reply, before which no other may come.
    ///
    /// # Errors
    /// Where the reply breaks a rule.
    pub fn call(&mut self, request: Request) -> Result<Reply> {
        self.next_cookie += 1;
        let request = request.named(self.next_cookie);
        self.send(&request)?;
        let reply = self.reply()?;
        ensure!(reply.cookie == request.cookie, "cookie {:x} for {request:?}", reply.cookie);
        Ok(reply)
    }

    /// The same; the reply must be without an error.
    ///
    /// # Errors
    /// Also if the server refuses.
    pub fn done(&mut self, request: Request) -> Result<Reply> {
        let shown = request.head();
        let reply = self.call(request)?;
        ensure!(reply.error == 0, "error {} for {shown:?}", reply.error);
        Ok(reply)
    }

    /// The same; the reply must be that error.
    ///
    /// # Errors
    /// If it is not.
    pub fn fails(&mut self, request: Request, error: u32) -> Result<()> {
        let shown = request.head();
        let reply = self.call(request)?;
        ensure!(reply.error == error, "error {} instead of {error} for {shown:?}", reply.error);
        Ok(())
    }

    /// Reads.
    ///
    /// # Errors
    /// As [`Self::done`].
    pub fn read(&mut self, offset: u64, len: u64) -> Result<Vec<u8>> {
        Ok(self.done(Request::new(NBD_CMD_READ, 0, offset, len))?.data)
    }

    /// Writes.
    ///
    /// # Errors
    /// As [`Self::done`].
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        self.done(Request::write(self.form, offset, data)).map(drop)
    }

    /// The next whole reply.
    ///
    /// # Errors
    /// Where it breaks a rule, or does not come.
    pub fn reply(&mut self) -> Result<Reply> {
        self.poll(LIMIT)?.with_context(|| format!("no reply within {LIMIT:?}, {} due", self.in_flight()))
    }

    /// The same; none if nothing has begun to come within `limit`.
    ///
    /// # Errors
    /// Where it breaks a rule.
    pub fn poll(&mut self, limit: Duration) -> Result<Option<Reply>> {
        loop {
            let Some(magic) = self.wire.peek(4, limit)? else { return Ok(None) };
            let found = match (short(magic), self.form) {
                (NBD_SIMPLE_REPLY_MAGIC, Form::Simple | Form::Structured) => self.simple()?,
                (NBD_STRUCTURED_REPLY_MAGIC, Form::Structured) => self.chunk(20)?,
                (NBD_EXTENDED_REPLY_MAGIC, Form::Extended) => self.chunk(32)?,
                (other, form) => bail!("a reply begins with {other:#x} in a session of {form:?}"),
            };
            if found.is_some() {
                return Ok(found);
            }
        }
    }

    /// Asks the server to disconnect, and waits for the end, before which every reply due must come.
    ///
    /// # Errors
    /// If one does not.
    pub fn disconnect(mut self) -> Result<Vec<Reply>> {
        self.send(&Request::new(NBD_CMD_DISC, 0, 0, 0))?;
        let mut replies = Vec::new();
        while self.in_flight() > 0 {
            replies.push(self.reply()?);
        }
        self.wire.expect_end()?;
        Ok(replies)
    }

    fn pending(&mut self, cookie: u64) -> Result<&mut Pending> {
        let queue = self.pending.get_mut(&cookie);
        queue.and_then(VecDeque::front_mut).with_context(|| format!("a reply with cookie {cookie:#x}"))
    }

    fn simple(&mut self) -> Result<Option<Reply>> {
        let head = self.wire.take(16)?;
        let (error, cookie, form) = (short(&head[4..8]), number(&head[8..16]), self.form);
        let pending = self.pending(cookie)?;
        let (command, len, begun) = (pending.command, pending.len, pending.reply.pieces);
        if form == Form::Structured {
            let payload = matches!(command, NBD_CMD_READ | NBD_CMD_BLOCK_STATUS);
            ensure!(!payload, "a simple reply to command {command} among structured ones");
            ensure!(error == 0, "a simple reply with error {error} among structured ones");
        }
        ensure!(begun == 0, "a simple reply behind chunks");
        judge_error(error, true)?;
        let data = if error == 0 && command == NBD_CMD_READ {
            self.wire.take(usize::try_from(len)?)?
        } else {
            Vec::new()
        };
        self.end(cookie, |pending| {
            pending.reply.error = error;
            pending.covered = data.len() as u64;
            pending.reply.data = data;
        })
        .map(Some)
    }

    fn chunk(&mut self, head_len: usize) -> Result<Option<Reply>> {
        let head = self.wire.take(head_len)?;
        let (flags, kind, cookie) = (tiny(&head[4..6]), tiny(&head[6..8]), number(&head[8..16]));
        let len = if head_len == 32 { number(&head[24..32]) } else { number(&head[16..20]) };
        ensure!(flags & !NBD_REPLY_FLAG_DONE == 0, "flags {flags:#x} of a chunk");
        ensure!(len <= 33 << 20, "a chunk of {len} bytes");
        let payload = self.wire.take(usize::try_from(len)?)?;
        let extended = head_len == 32;
        let pending = self.pending(cookie)?;
        if extended {
            let offset = number(&head[16..24]);
            ensure!(offset == pending.offset, "offset {offset:#x} in a reply to {:#x}", pending.offset);
        }
        pending.take(kind, &payload, extended)?;
        ensure!(kind != NBD_REPLY_TYPE_NONE || flags == NBD_REPLY_FLAG_DONE, "NBD_REPLY_TYPE_NONE not last");
        if flags & NBD_REPLY_FLAG_DONE == 0 {
            return Ok(None);
        }
        self.end(cookie, |_| ()).map(Some)
    }

    /// Closes a request whose reply is whole.
    fn end(&mut self, cookie: u64, note: impl FnOnce(&mut Pending)) -> Result<Reply> {
        let queue = self.pending.get_mut(&cookie).context("a reply to nothing")?;
        let mut pending = queue.pop_front().context("a reply to nothing")?;
        if queue.is_empty() {
            self.pending.remove(&cookie);
        }
        note(&mut pending);
        pending.judge(self.form)?;
        Ok(pending.reply)
    }
}

impl Pending {
    /// Takes in a chunk.
    fn take(&mut self, kind: u16, payload: &[u8], extended: bool) -> Result<()> {
        match kind {
            NBD_REPLY_TYPE_NONE => ensure!(payload.is_empty(), broken("NBD_REPLY_TYPE_NONE", payload)),
            NBD_REPLY_TYPE_OFFSET_DATA => {
                ensure!(payload.len() > 8, broken("NBD_REPLY_TYPE_OFFSET_DATA", payload));
                self.content(number(&payload[..8]), &payload[8..], payload.len() as u64 - 8)?;
            }
            NBD_REPLY_TYPE_OFFSET_HOLE => {
                ensure!(payload.len() == 12, broken("NBD_REPLY_TYPE_OFFSET_HOLE", payload));
                self.content(number(&payload[..8]), &[], number(&payload[8..]))?;
            }
            NBD_REPLY_TYPE_BLOCK_STATUS if !extended => self.status(payload, 4, 4)?,
            NBD_REPLY_TYPE_BLOCK_STATUS_EXT if extended => {
                ensure!(payload.len() >= 8, broken("NBD_REPLY_TYPE_BLOCK_STATUS_EXT", payload));
                let count = number(&payload[4..8]) as usize;
                ensure!(
                    count == 0 || payload.len() == 8 + 16 * count,
                    broken("count of descriptors", payload)
                );
                self.status(payload, 8, 8)?;
            }
            NBD_REPLY_TYPE_ERROR => {
                ensure!(payload.len() >= 6, broken("NBD_REPLY_TYPE_ERROR", payload));
                let text_len = usize::from(tiny(&payload[4..6]));
                ensure!(payload.len() == 6 + text_len, broken("text of an error", payload));
                judge_string("text of an error", &payload[6..])?;
                judge_error(short(&payload[..4]), false)?;
                self.reply.error = short(&payload[..4]);
            }
            other => bail!("a chunk of type {other:#x}"),
        }
        Ok(())
    }

    /// A part of a read: its data, or zeroes where there is none.
    fn content(&mut self, offset: u64, data: &[u8], len: u64) -> Result<()> {
        ensure!(self.command == NBD_CMD_READ, "content in a reply to command {}", self.command);
        ensure!(len > 0, "an empty part of a read");
        let inside = offset >= self.offset && offset.saturating_add(len) <= self.offset + self.len;
        ensure!(inside, "{len} bytes at {offset} in a read of {} at {}", self.len, self.offset);
        if self.reply.pieces == 0 {
            self.reply.data = vec![0; usize::try_from(self.len)?];
        }
        let at = usize::try_from(offset - self.offset)?;
        self.reply.data[at..at + data.len()].copy_from_slice(data);
        self.reply.pieces += 1;
        self.covered += len;
        Ok(())
    }

    /// What one context says, in descriptors whose two numbers have `width` bytes each.
    fn status(&mut self, payload: &[u8], head: usize, width: usize) -> Result<()> {
        ensure!(self.command == NBD_CMD_BLOCK_STATUS, "a status in a reply to command {}", self.command);
        let list = payload.get(head..).unwrap_or_default();
        let whole = !list.is_empty() && list.len().is_multiple_of(2 * width);
        ensure!(whole, broken("descriptors", payload));
        let context = short(&payload[..4]);
        let again = self.reply.status.iter().any(|(seen, _)| *seen == context);
        ensure!(!again, "context {context} twice");
        let pairs = list.chunks_exact(2 * width);
        let list: Vec<(u64, u64)> = pairs.map(|d| (number(&d[..width]), number(&d[width..]))).collect();
        ensure!(list.iter().all(|(len, _)| *len > 0), "an empty descriptor: {list:?}");
        ensure!(list.iter().all(|(_, state)| *state <= 0xffff_ffff), "upper half of a state: {list:?}");
        let differ = list.windows(2).all(|pair| pair[0].1 != pair[1].1);
        ensure!(differ, "neighbours of one state: {list:?}");
        // Only the last may go further than the request, and of that we take none either.
        let sum: u64 = list.iter().map(|(len, _)| len).sum();
        ensure!(sum <= self.len, "{sum} bytes described of {}: {list:?}", self.len);
        let one = self.flags & NBD_CMD_FLAG_REQ_ONE == 0 || list.len() == 1;
        ensure!(one, "NBD_CMD_FLAG_REQ_ONE brings {list:?}");
        self.reply.status.push((context, list));
        Ok(())
    }

    /// What can be said only of a whole reply.
    fn judge(&self, form: Form) -> Result<()> {
        if self.reply.error != 0 {
            return Ok(());
        }
        if self.command == NBD_CMD_READ {
            // Chunks that overlap would make it more, gaps less.
            ensure!(self.covered == self.len, "{} of {} bytes read", self.covered, self.len);
        }
        if self.flags & NBD_CMD_FLAG_DF != 0 && form.chunks() {
            ensure!(self.reply.pieces <= 1, "NBD_CMD_FLAG_DF brings {} pieces", self.reply.pieces);
        }
        if self.command == NBD_CMD_BLOCK_STATUS {
            ensure!(!self.reply.status.is_empty(), "a block status that says nothing");
        }
        Ok(())
    }
}

fn judge_error(error: u32, may_be_none: bool) -> Result<()> {
    let known = ERRORS.contains(&error) || (may_be_none && error == 0);
    ensure!(known, "error number {error}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::wire::pair;
    use super::*;

    const COOKIE: u64 = 7;

    /// What becomes of a request that is answered with these bytes.
    fn judged(form: Form, request: &Request, chunks: &[Vec<u8>]) -> Result<Reply> {
        let (wire, mut server) = pair();
        let mut session = Session::new(wire, form);
        session.send(&request.clone().named(COOKIE)).unwrap();
        server.write_all(&chunks.concat()).unwrap();
        drop(server);
        session.reply()
    }

    fn simple(error: u32, data: &[u8]) -> Vec<u8> {
        let magic = NBD_SIMPLE_REPLY_MAGIC.to_be_bytes();
        [&magic[..], &error.to_be_bytes(), &COOKIE.to_be_bytes(), data].concat()
    }

    fn chunk(flags: u16, kind: u16, payload: &[u8]) -> Vec<u8> {
        let head = [&NBD_STRUCTURED_REPLY_MAGIC.to_be_bytes()[..], &flags.to_be_bytes(), &kind.to_be_bytes()];
        let len = u32::try_from(payload.len()).unwrap();
        [&head.concat()[..], &COOKIE.to_be_bytes(), &len.to_be_bytes(), payload].concat()
    }

    fn extended(offset: u64, kind: u16, payload: &[u8]) -> Vec<u8> {
        let head = [&NBD_EXTENDED_REPLY_MAGIC.to_be_bytes()[..], &1u16.to_be_bytes(), &kind.to_be_bytes()];
        let len = payload.len() as u64;
        [&head.concat()[..], &COOKIE.to_be_bytes(), &offset.to_be_bytes(), &len.to_be_bytes(), payload]
            .concat()
    }

    fn data(offset: u64, len: usize) -> Vec<u8> {
        [&offset.to_be_bytes()[..], &vec![1; len]].concat()
    }

    fn hole(offset: u64, len: u32) -> Vec<u8> {
        [&offset.to_be_bytes()[..], &len.to_be_bytes()].concat()
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_be_bytes()).collect()
    }

    #[test]
    fn good_replies_are_taken() {
        let read = Request::new(NBD_CMD_READ, 0, 512, 16);
        assert_eq!(judged(Form::Simple, &read, &[simple(0, &[3; 16])]).unwrap().data, [3; 16]);
        let parts = [chunk(0, 2, &hole(520, 8)), chunk(1, 1, &data(512, 8))];
        let reply = judged(Form::Structured, &read, &parts).unwrap();
        assert_eq!(reply.data, [[1; 8], [0; 8]].concat());
        let error = [&words(&[22])[..], &[0, 2], b"no"].concat();
        let reply = judged(Form::Extended, &read, &[extended(512, NBD_REPLY_TYPE_ERROR, &error)]).unwrap();
        assert_eq!(reply.error, 22);
        let status = Request::new(NBD_CMD_BLOCK_STATUS, 0, 0, 100);
        let list = [chunk(0, 5, &words(&[1, 50, 0, 50, 3])), chunk(1, 5, &words(&[2, 100, 0]))];
        let reply = judged(Form::Structured, &status, &list).unwrap();
        assert_eq!(reply.status, [(1, vec![(50, 0), (50, 3)]), (2, vec![(100, 0)])]);
    }

    #[test]
    fn replies_that_break_a_rule_are_found() {
        let read = Request::new(NBD_CMD_READ, NBD_CMD_FLAG_DF, 512, 16);
        let status = Request::new(NBD_CMD_BLOCK_STATUS, NBD_CMD_FLAG_REQ_ONE, 0, 100);
        let flush = Request::new(NBD_CMD_FLUSH, 0, 0, 0);
        let whole = chunk(1, 1, &data(512, 16));
        let broken: [(&str, Form, &Request, Vec<Vec<u8>>); 19] = [
            ("simple read among chunks", Form::Structured, &read, vec![simple(0, &[3; 16])]),
            ("simple error among chunks", Form::Structured, &flush, vec![simple(22, &[])]),
            ("simple among extended", Form::Extended, &flush, vec![simple(0, &[])]),
            ("chunk among simple", Form::Simple, &read, vec![whole.clone()]),
            ("compact chunk among extended", Form::Extended, &read, vec![whole]),
            ("unknown error number", Form::Simple, &flush, vec![simple(2, &[])]),
            ("gap", Form::Structured, &read, vec![chunk(1, 1, &data(512, 15))]),
            ("twice", Form::Structured, &read, vec![chunk(0, 2, &hole(512, 8)), chunk(1, 1, &data(512, 16))]),
            ("outside", Form::Structured, &read, vec![chunk(1, 1, &data(513, 16))]),
            (
                "pieces with DF",
                Form::Structured,
                &read,
                vec![chunk(0, 2, &hole(520, 8)), chunk(1, 1, &data(512, 8))],
            ),
            ("unknown flag", Form::Structured, &read, vec![chunk(3, 1, &data(512, 16))]),
            ("unknown type", Form::Structured, &flush, vec![chunk(1, 9, &[])]),
            ("none with payload", Form::Structured, &flush, vec![chunk(1, 0, &[1])]),
            ("none that is not last", Form::Structured, &flush, vec![chunk(0, 0, &[]), chunk(1, 0, &[])]),
            ("text too short", Form::Structured, &flush, vec![chunk(1, 0x8001, &[0, 0, 0, 22, 0, 2, b'x'])]),
            ("error 0", Form::Structured, &flush, vec![chunk(1, 0x8001, &[0, 0, 0, 0, 0, 0])]),
            ("another offset", Form::Extended, &read, vec![extended(513, 1, &data(512, 16))]),
            ("two with REQ_ONE", Form::Structured, &status, vec![chunk(1, 5, &words(&[1, 50, 0, 50, 3]))]),
            ("empty descriptor", Form::Structured, &status, vec![chunk(1, 5, &words(&[1, 0, 3]))]),
        ];
        for (what, form, request, chunks) in broken {
            assert!(judged(form, request, &chunks).is_err(), "{what}");
        }
    }
}
