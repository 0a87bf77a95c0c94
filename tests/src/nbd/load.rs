//! Random requests, right and wrong, many in flight, in rounds of a connection each. What each must be answered
//! with follows from `docs/nbd.md`, what reads must bring from a model of the area that is the load's own.
//!
//! The same seed asks the same requests. Nothing is ever sent twice.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};

use super::model::Model;
use super::options::Talk;
use super::session::{Form, Reply, Request, Session};
use super::spec::*;
use super::wire::Address;
use crate::bits::Random;

/// Most requests in flight.
const DEPTH: usize = 64;
/// Requests that are sent at once.
const BATCH: u64 = 24;
/// Most requests of one connection.
const ROUND: u64 = 20_000;
/// Longest valid range.
const LEN_MAX: u64 = 16 << 10;
/// A part of the area where most requests overlap.
const HOT: u64 = 128 << 10;
/// One request in so many is a write that is too long.
const TOO_LONG: u64 = 60_000;
const PAYLOAD_MAX: u64 = 32 << 20;

/// What is asked of whom.
#[derive(Clone, Debug)]
pub struct Load {
    /// Where the server listens.
    pub address: Address,
    /// The export.
    pub export: String,
    /// Its size.
    pub size: u64,
    /// Replies to agree on.
    pub form: Form,
    /// The export offers fast zeroes.
    pub fast_zero: bool,
    /// What nobody else writes to; zeroes at first.
    pub area: Range<u64>,
    /// What others write to as well: answers are checked there, data is not.
    pub shared: Range<u64>,
    /// Of all that is random.
    pub seed: u64,
}

/// Zeroes that are to take their space, and quickly: that cannot be.
const FAST_WITH_SPACE: u16 = NBD_CMD_FLAG_FAST_ZERO | NBD_CMD_FLAG_NO_HOLE;

/// What came of a load.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    /// Requests answered.
    pub answered: u64,
    /// Those that had to be refused, and were.
    pub refused: u64,
    /// Bytes of reads and states that were compared with the model.
    pub compared: u64,
    /// Connections.
    pub connections: u64,
}

/// A request in flight.
struct Flight {
    command: u16,
    error: u32,
    /// Whether its range lies in the area.
    own: bool,
}

/// A load under way.
struct Run<'a> {
    load: &'a Load,
    random: Random,
    /// Where the data of writes comes from.
    pool: Vec<u8>,
    model: Model,
    flights: HashMap<u64, Flight>,
    cookie: u64,
    outcome: Outcome,
}

impl Load {
    /// Sends so many requests, and reads the whole area at the end.
    ///
    /// # Errors
    /// At the first answer that is not the right one.
    pub fn run(&self, requests: u64) -> Result<Outcome> {
        self.run_until(requests, &AtomicBool::new(true))
    }

    /// The same, and goes on until `stop` is set.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_until(&self, requests: u64, stop: &AtomicBool) -> Result<Outcome> {
        let mut random = Random::new(self.seed);
        let pool = (0..8 << 10).flat_map(|_| random.next().to_le_bytes()).collect();
        let len = usize::try_from(self.area.end - self.area.start)?;
        let (model, flights) = (Model::new(len), HashMap::new());
        let mut run =
            Run { load: self, random, pool, model, flights, cookie: 0, outcome: Outcome::default() };
        while run.outcome.answered < requests || !stop.load(Ordering::Relaxed) {
            let left = requests.checked_sub(run.outcome.answered).filter(|left| *left > 0);
            let round = (1 + run.random.below(ROUND)).min(left.unwrap_or(ROUND / 10));
            run.round(round)
                .with_context(|| format!("seed {}, {:?}, {}", self.seed, self.form, run.cookie))?;
        }
        run.read_all().with_context(|| format!("seed {}, the whole area, {:?}", self.seed, self.form))?;
        Ok(run.outcome)
    }

    /// The error that a request must be answered with, 0 if it must be done.
    fn error_of(&self, request: &Request, contexts: bool) -> u32 {
        let Request { flags, command, offset, len, .. } = *request;
        let (chunks, extended) = (self.form.chunks(), self.form == Form::Extended);
        let own = match command {
            NBD_CMD_READ if chunks => NBD_CMD_FLAG_DF,
            NBD_CMD_WRITE if extended => NBD_CMD_FLAG_PAYLOAD_LEN,
            NBD_CMD_WRITE_ZEROES if self.fast_zero => NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO,
            NBD_CMD_WRITE_ZEROES => NBD_CMD_FLAG_NO_HOLE,
            NBD_CMD_BLOCK_STATUS => NBD_CMD_FLAG_REQ_ONE,
            _ => 0,
        };
        let past =
            if matches!(command, NBD_CMD_WRITE | NBD_CMD_WRITE_ZEROES) { NBD_ENOSPC } else { NBD_EINVAL };
        let wrong = flags & !(own | NBD_CMD_FLAG_FUA) != 0
            || command > NBD_CMD_BLOCK_STATUS
            || (command == NBD_CMD_BLOCK_STATUS && !contexts)
            || (command == NBD_CMD_WRITE && extended && flags & NBD_CMD_FLAG_PAYLOAD_LEN == 0)
            || (matches!(command, NBD_CMD_READ | NBD_CMD_WRITE) && len > PAYLOAD_MAX);
        match (command, wrong) {
            (_, true) => NBD_EINVAL,
            (NBD_CMD_FLUSH, false) => {
                if offset == 0 && len == 0 {
                    0
                } else {
                    NBD_EINVAL
                }
            }
            _ if len == 0 => NBD_EINVAL,
            _ if offset.checked_add(len).is_none_or(|end| end > self.size) => past,
            (NBD_CMD_WRITE_ZEROES, false) if flags & FAST_WITH_SPACE == FAST_WITH_SPACE => NBD_ENOTSUP,
            _ => 0,
        }
    }

    /// Where a range lies in the area.
    fn place(&self, offset: u64, len: u64) -> Option<Range<usize>> {
        let end = offset.checked_add(len)?;
        let inside = offset >= self.area.start && end <= self.area.end;
        let at = |byte: u64| usize::try_from(byte - self.area.start).ok();
        if inside { Some(at(offset)?..at(end)?) } else { None }
    }
}

impl Run<'_> {
    /// So many requests on a connection of their own, which then ends in one way or another.
    fn round(&mut self, requests: u64) -> Result<()> {
        let load = self.load;
        let mut talk = Talk::agreed(&load.address, load.form)?;
        let chosen = load.form.chunks() && self.random.chance(7, 8);
        let allocation = if chosen {
            Some(talk.choose(&load.export, &["base:allocation", "blkrepl:dirty"])?[0])
        } else {
            None
        };
        let (mut session, _) = talk.go(&load.export)?;
        self.outcome.connections += 1;
        let mut left = requests;
        while left > 0 {
            let batch = BATCH.min(left);
            let mut bytes = Vec::new();
            for _ in 0..batch {
                let request = self.request();
                bytes.extend(session.note(&request));
                self.note(&request, chosen);
            }
            session.wire.send(&bytes)?;
            left -= batch;
            while session.in_flight() > DEPTH - BATCH as usize {
                let reply = session.reply()?;
                self.judge(&reply, allocation)?;
            }
        }
        self.end(session, allocation)
    }

    /// Ends a connection: with a goodbye while requests are in flight, or when all is answered with nonsense or
    /// without a word.
    fn end(&mut self, mut session: Session, allocation: Option<u32>) -> Result<()> {
        let way = self.random.below(3);
        if way == 0 {
            for reply in session.disconnect()? {
                self.judge(&reply, allocation)?;
            }
        } else {
            while session.in_flight() > 0 {
                let reply = session.reply()?;
                self.judge(&reply, allocation)?;
            }
            if way == 1 {
                session.wire.send(&[0x4e; 32])?;
                session.wire.expect_end()?;
            }
        }
        ensure!(self.flights.is_empty(), "{} requests without an answer", self.flights.len());
        Ok(())
    }

    /// The next request: a right one, of which some are then made wrong.
    fn request(&mut self) -> Request {
        self.cookie += 1;
        let mut request = self.right().named(self.cookie);
        if self.random.chance(1, 6) {
            self.spoil(&mut request);
        }
        if self.random.chance(1, TOO_LONG) {
            request = Request::write(self.load.form, request.offset, &vec![0xee; PAYLOAD_MAX as usize + 512])
                .named(self.cookie);
        }
        request
    }

    fn right(&mut self) -> Request {
        let commands = [
            NBD_CMD_READ,
            NBD_CMD_READ,
            NBD_CMD_READ,
            NBD_CMD_READ,
            NBD_CMD_WRITE,
            NBD_CMD_WRITE,
            NBD_CMD_TRIM,
            NBD_CMD_WRITE_ZEROES,
            NBD_CMD_CACHE,
            NBD_CMD_BLOCK_STATUS,
            NBD_CMD_BLOCK_STATUS,
        ];
        if self.random.chance(1, 40) {
            return Request::new(NBD_CMD_FLUSH, 0, 0, 0);
        }
        let command = commands[self.random.below(commands.len() as u64) as usize];
        let (offset, len) = self.range();
        let mut request = if command == NBD_CMD_WRITE {
            let from = self.random.below(self.pool.len() as u64 - LEN_MAX) as usize;
            Request::write(self.load.form, offset, &self.pool[from..from + len as usize])
        } else {
            Request::new(command, 0, offset, len)
        };
        if self.random.chance(1, 16) {
            request.flags |= match command {
                NBD_CMD_READ => NBD_CMD_FLAG_DF,
                NBD_CMD_WRITE_ZEROES => [NBD_CMD_FLAG_NO_HOLE, NBD_CMD_FLAG_FAST_ZERO, FAST_WITH_SPACE]
                    [self.random.below(3) as usize],
                NBD_CMD_BLOCK_STATUS => NBD_CMD_FLAG_REQ_ONE,
                _ => NBD_CMD_FLAG_FUA,
            };
        }
        request
    }

    /// A range in the area, often where the others are, or in what is shared; most are aligned.
    fn range(&mut self) -> (u64, u64) {
        let within = if self.random.chance(1, 8) { &self.load.shared } else { &self.load.area };
        let span = within.end - within.start;
        let span = if self.random.chance(1, 4) { span.min(HOT) } else { span };
        let grain = [4096, 4096, 4096, 512, 1][self.random.below(5) as usize];
        let len = (1 + self.random.below(LEN_MAX / grain)) * grain;
        let len = if self.random.chance(1, 2) { len.min(4096) } else { len };
        let offset = self.random.below((span - len) / grain + 1) * grain;
        (within.start + offset, len)
    }

    /// Makes a request wrong in one way, or strange.
    fn spoil(&mut self, request: &mut Request) {
        let size = self.load.size;
        let length = |request: &mut Request, len: u64| {
            request.len = len;
            if !request.payload.is_empty() {
                request.payload.resize(len as usize, 0x3c);
            }
        };
        match self.random.below(9) {
            0 => request.command = 8 + (self.random.next() & 0x7fff) as u16,
            1 => request.flags ^= 1 << self.random.below(16),
            2 => request.offset = size - self.random.below(request.len.max(1)),
            3 => request.offset = u64::MAX - self.random.below(LEN_MAX),
            4 => request.offset = size.saturating_add(self.random.next() >> self.random.below(64)),
            5 => length(request, 0),
            6 if request.payload.is_empty() => request.len = u64::from(u32::MAX) - self.random.below(1 << 20),
            7 if request.payload.is_empty() && self.load.form == Form::Extended => {
                request.len = self.random.next() | 1 << 40;
            }
            _ => request.flags = (self.random.next() & 0xffff) as u16,
        }
        // The header says whether a payload follows it; the stream must say the same.
        let follows = match self.load.form {
            Form::Extended => request.flags & NBD_CMD_FLAG_PAYLOAD_LEN != 0,
            Form::Simple | Form::Structured => request.command == NBD_CMD_WRITE,
        };
        if !follows {
            request.payload = Vec::new();
        } else if request.len > 1 << 20 {
            // Nothing so long is sent.
            length(request, 100);
            request.payload.resize(100, 0x3c);
        } else {
            request.payload.resize(request.len as usize, 0x3c);
        }
    }

    /// Takes in what a request that is about to be sent will do.
    fn note(&mut self, request: &Request, contexts: bool) {
        let error = self.load.error_of(request, contexts);
        let place = self.load.place(request.offset, request.len).filter(|_| error == 0);
        let flight = Flight { command: request.command, error, own: place.is_some() };
        self.flights.insert(request.cookie, flight);
        let Some(range) = place else { return };
        match request.command {
            NBD_CMD_WRITE => self.model.write(request.cookie, range, Some(&request.payload)),
            NBD_CMD_TRIM | NBD_CMD_WRITE_ZEROES => self.model.write(request.cookie, range, None),
            NBD_CMD_READ | NBD_CMD_BLOCK_STATUS => self.model.read(request.cookie, range),
            _ => {}
        }
    }

    /// Judges an answer.
    fn judge(&mut self, reply: &Reply, allocation: Option<u32>) -> Result<()> {
        let flight = self.flights.remove(&reply.cookie);
        let Flight { command, error, own } = flight.context("a reply to nothing")?;
        ensure!(reply.error == error, "error {} instead of {error}, command {command}", reply.error);
        self.outcome.answered += 1;
        self.outcome.refused += u64::from(error != 0);
        if !own {
            return Ok(());
        }
        match command {
            NBD_CMD_READ => {
                let judged = self.model.judge(reply.cookie, 0..reply.data.len(), &reply.data)?;
                self.outcome.compared += judged as u64;
            }
            NBD_CMD_BLOCK_STATUS => self.judge_status(reply, allocation)?,
            _ => {}
        }
        self.model.written(reply.cookie);
        self.model.forget(reply.cookie);
        Ok(())
    }

    /// What is said to be zeroes must be.
    fn judge_status(&mut self, reply: &Reply, allocation: Option<u32>) -> Result<()> {
        let said = reply.status.iter().find(|(number, _)| Some(*number) == allocation);
        let (_, list) = said.context("no status of base:allocation")?;
        ensure!(reply.status.len() == 2, "{} contexts answered", reply.status.len());
        let mut at = 0;
        for (len, state) in list {
            let len = usize::try_from(*len)?;
            if state & NBD_STATE_ZERO != 0 {
                let zeroes = vec![0; at + len];
                let judged = self.model.judge(reply.cookie, at..at + len, &zeroes)?;
                self.outcome.compared += judged as u64;
            }
            at += len;
        }
        Ok(())
    }

    /// Reads the whole area on a connection of its own.
    fn read_all(&mut self) -> Result<()> {
        let load = self.load;
        let (mut session, _) = Talk::agreed(&load.address, load.form)?.go(&load.export)?;
        for offset in load.area.clone().step_by(64 << 10) {
            let len = (load.area.end - offset).min(64 << 10);
            self.cookie += 1;
            let range = load.place(offset, len).context("a place in the area")?;
            self.model.read(self.cookie, range);
            let data = session.read(offset, len)?;
            self.outcome.compared += self.model.judge(self.cookie, 0..data.len(), &data)? as u64;
            self.model.forget(self.cookie);
        }
        Ok(())
    }
}
