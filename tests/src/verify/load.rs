//! One worker of the verifier: a connection with several requests in flight, a model of its private
//! units, a record of what it did to shared ones; it reconnects to whoever is primary and replays.
//!
//! It never has two requests in flight for one unit of its own making, so that each unit's operations
//! of this worker are in order. A finding ends the worker at once.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::history::{Access, HistoryOp};
use super::model::UnitModel;
use super::pattern::{Pattern, Value};
use super::{LoadReport, VerifierOptions, connect_each};
use crate::bits::Random;
use crate::client::{Answer, Link, Request};

/// Longest time to find a primary that accepts us.
const RECONNECT_LIMIT: Duration = Duration::from_secs(180);

/// What all workers have in common.
pub(super) struct Shared {
    pub(super) pattern: Pattern,
    ticks: AtomicU64,
    numbers: AtomicU64,
    flushed_before: AtomicU64,
}

impl Shared {
    pub(super) fn new(pattern: Pattern) -> Self {
        let one = || AtomicU64::new(1);
        Self { pattern, ticks: one(), numbers: one(), flushed_before: AtomicU64::new(0) }
    }

    /// The next moment; no two are equal.
    pub(super) fn tick(&self) -> u64 {
        self.ticks.fetch_add(1, Ordering::SeqCst)
    }

    /// Everything acknowledged before this tick was flushed since, on whatever connection.
    pub(super) fn flushed_before(&self) -> u64 {
        self.flushed_before.load(Ordering::SeqCst)
    }

    fn number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::SeqCst)
    }
}

/// What a worker leaves.
pub(super) struct WorkerEnd {
    pub(super) models: Vec<UnitModel>,
    pub(super) history: Vec<HistoryOp>,
    pub(super) report: LoadReport,
    pub(super) finding: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write { number: u64, fua: bool },
    Zero { trim: bool },
    Flush,
}

#[derive(Clone, Debug)]
struct Op {
    kind: Kind,
    first: u64,
    count: u64,
    start: u64,
}

impl Op {
    fn units(&self) -> std::ops::Range<u64> {
        self.first..self.first + self.count
    }

    fn value(&self) -> Option<Value> {
        match self.kind {
            Kind::Write { number, .. } => Some(Value::Tag(number)),
            Kind::Zero { .. } => Some(Value::Zero),
            Kind::Read | Kind::Flush => None,
        }
    }
}

pub(super) struct Worker {
    index: u64,
    options: VerifierOptions,
    targets: Vec<String>,
    shared: Arc<Shared>,
    models: Vec<UnitModel>,
    stop: Arc<AtomicBool>,
    acked: Arc<AtomicU64>,
    random: Random,
    open: BTreeMap<u64, Op>,
    busy: BTreeSet<u64>,
    replay: VecDeque<Op>,
    history: Vec<HistoryOp>,
    /// Per shared unit: places in `history` of our writes that were never answered and whose bound is
    /// not known yet.
    dangling: BTreeMap<u64, Vec<usize>>,
    report: LoadReport,
    last_answer: Instant,
}

/// Why a worker's turn ended.
enum Trouble {
    /// The connection is gone; reconnect and replay.
    Broken,
    /// The volume did what it must not.
    Finding(String),
}

impl Worker {
    #[expect(clippy::too_many_arguments, reason = "made in one place, each argument is a part of it")]
    pub(super) fn new(
        index: u64,
        round: u64,
        options: VerifierOptions,
        targets: Vec<String>,
        shared: Arc<Shared>,
        models: Vec<UnitModel>,
        stop: Arc<AtomicBool>,
        acked: Arc<AtomicU64>,
    ) -> Self {
        let random = Random::new(options.seed ^ (round << 32) ^ (index << 16));
        Self {
            index,
            options,
            targets,
            shared,
            models,
            stop,
            acked,
            random,
            open: BTreeMap::new(),
            busy: BTreeSet::new(),
            replay: VecDeque::new(),
            history: Vec::new(),
            dangling: BTreeMap::new(),
            report: LoadReport::default(),
            last_answer: Instant::now(),
        }
    }

    pub(super) fn run(mut self) -> WorkerEnd {
        let finding = self.drive().err();
        WorkerEnd { models: self.models, history: self.history, report: self.report, finding }
    }

    fn drive(&mut self) -> Result<(), String> {
        loop {
            let mut link = connect_each(&self.targets, self.options.connect_limit, RECONNECT_LIMIT)
                .map_err(|e| format!("{e:#}"))?;
            self.report.connects += 1;
            match self.serve(&mut link) {
                Ok(()) => return Ok(()),
                Err(Trouble::Finding(text)) => return Err(text),
                Err(Trouble::Broken) => self.give_up_open(),
            }
        }
    }

    /// Works on one connection until told to stop or until it breaks.
    fn serve(&mut self, link: &mut Link) -> Result<(), Trouble> {
        loop {
            let stopping = self.stop.load(Ordering::SeqCst);
            while self.open.len() < self.options.depth {
                let Some(op) = self.next_op(stopping) else { break };
                self.submit(link, op)?;
            }
            if self.open.is_empty() {
                if stopping && self.replay.is_empty() {
                    return Ok(());
                }
                continue;
            }
            let answer = link.next(self.options.answer_limit).map_err(|_| Trouble::Broken)?;
            self.on_answer(answer)?;
            if !stopping && !self.options.pause.is_zero() {
                std::thread::sleep(self.options.pause);
            }
        }
    }

    /// What to send next: replays first; nothing new when stopping.
    fn next_op(&mut self, stopping: bool) -> Option<Op> {
        if let Some(op) = self.replay.pop_front() {
            return Some(op);
        }
        if stopping {
            return None;
        }
        if self.random.chance(1, 64) {
            return Some(Op { kind: Kind::Flush, first: 0, count: 0, start: 0 });
        }
        // A few tries to find units that no request of ours is on; else the queue is full enough.
        (0..4).find_map(|_| self.pick())
    }

    fn pick(&mut self) -> Option<Op> {
        let private =
            self.options.private_units > 0 && (self.options.shared_units == 0 || self.random.chance(1, 2));
        let (base, len) = if private {
            (self.options.shared_units + self.index * self.options.private_units, self.options.private_units)
        } else {
            (0, self.options.shared_units)
        };
        let count = 1 + self.random.below(self.options.request_units_max.min(len));
        let first = base + self.random.below(len - count + 1);
        if (first..first + count).any(|unit| self.busy.contains(&unit)) {
            return None;
        }
        let kind = match self.random.below(10) {
            0..=2 => Kind::Read,
            3 if private => Kind::Zero { trim: self.random.chance(1, 2) },
            _ => Kind::Write { number: self.shared.number(), fua: self.random.chance(1, 16) },
        };
        Some(Op { kind, first, count, start: 0 })
    }

    fn submit(&mut self, link: &mut Link, mut op: Op) -> Result<(), Trouble> {
        let unit_len = self.options.unit_len as u64;
        let offset = self.options.offset + op.first * unit_len;
        let len = u32::try_from(op.count * unit_len)
            .map_err(|_| Trouble::Finding("request too long".to_owned()))?;
        let request = match op.kind {
            Kind::Read => Request::Read { offset, len },
            Kind::Flush => Request::Flush,
            Kind::Zero { trim: true } => Request::Trim { offset, len },
            Kind::Zero { trim: false } => Request::WriteZeroes { offset, len },
            Kind::Write { number, fua } => {
                let mut data = Vec::with_capacity(len as usize);
                for unit in op.units() {
                    self.shared.pattern.fill(unit, Value::Tag(number), &mut data);
                }
                Request::Write { offset, data, fua }
            }
        };
        op.start = self.shared.tick();
        self.busy.extend(op.units());
        match link.submit(&request) {
            Ok(handle) => {
                self.open.insert(handle, op);
                Ok(())
            }
            Err(_) => {
                // It may have been sent in part; it is as open as the others.
                self.open.insert(u64::MAX, op);
                Err(Trouble::Broken)
            }
        }
    }

    fn on_answer(&mut self, answer: Answer) -> Result<(), Trouble> {
        let end = self.shared.tick();
        let Some(op) = self.open.remove(&answer.handle) else {
            return Err(Trouble::Finding(format!(
                "an answer to handle {}, which is not open",
                answer.handle
            )));
        };
        for unit in op.units() {
            self.busy.remove(&unit);
        }
        self.report.stall_max = self.report.stall_max.max(self.last_answer.elapsed());
        self.last_answer = Instant::now();
        match answer.result {
            Err(error) => {
                self.report.errors.push(format!("{:?} of units {:?}: {error}", op.kind, op.units()));
                // Whatever an error reply leaves of a write is as unknown as a lost answer.
                self.leave_unknown(&op);
                return Ok(());
            }
            Ok(data) => self.on_success(&op, &data, end)?,
        }
        self.report.acked += 1;
        self.acked.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn on_success(&mut self, op: &Op, data: &[u8], end: u64) -> Result<(), Trouble> {
        match op.kind {
            Kind::Flush => {
                self.shared.flushed_before.fetch_max(op.start, Ordering::SeqCst);
                return Ok(());
            }
            Kind::Read => self.on_read(op, data, end)?,
            Kind::Write { fua, .. } => self.on_written(op, end, fua),
            Kind::Zero { .. } => self.on_written(op, end, false),
        }
        // Whatever of ours was open on these units on an earlier connection is over now.
        for unit in op.units() {
            for place in self.dangling.remove(&unit).unwrap_or_default() {
                self.history[place].end = Some(end);
            }
        }
        Ok(())
    }

    fn on_written(&mut self, op: &Op, end: u64, fua: bool) {
        let Some(value) = op.value() else { return };
        let flushed = self.shared.flushed_before();
        for unit in op.units() {
            match self.model(unit) {
                Some(model) => model.acked(value, end, fua, flushed),
                None => self.record(unit, Access::Write(value), op.start, Some(end)),
            }
        }
    }

    fn on_read(&mut self, op: &Op, data: &[u8], end: u64) -> Result<(), Trouble> {
        let unit_len = self.options.unit_len;
        if data.len() as u64 != op.count * unit_len as u64 {
            let text = format!("a read of {} units returned {} bytes", op.count, data.len());
            return Err(Trouble::Finding(text));
        }
        for (unit, piece) in op.units().zip(data.chunks_exact(unit_len)) {
            let value = self.shared.pattern.read(unit, piece).map_err(|d| Trouble::Finding(d.to_string()))?;
            match self.model(unit) {
                Some(model) => {
                    model.observe(value).map_err(|f| Trouble::Finding(format!("unit {unit}: {f}")))?
                }
                None => self.record(unit, Access::Read(value), op.start, Some(end)),
            }
        }
        Ok(())
    }

    /// The connection broke: every open request may or may not have taken effect; writes are replayed
    /// as new operations, before anything else touches their units.
    fn give_up_open(&mut self) {
        let open = std::mem::take(&mut self.open);
        self.busy.clear();
        for op in open.into_values() {
            self.report.unknown += 1;
            self.leave_unknown(&op);
            let kind = match op.kind {
                Kind::Write { fua, .. } => Kind::Write { number: self.shared.number(), fua },
                Kind::Zero { trim } => Kind::Zero { trim },
                Kind::Read | Kind::Flush => continue,
            };
            self.replay.push_back(Op { kind, ..op });
        }
    }

    fn leave_unknown(&mut self, op: &Op) {
        let Some(value) = op.value() else { return };
        for unit in op.units() {
            match self.model(unit) {
                Some(model) => model.unknown(value),
                None => {
                    self.dangling.entry(unit).or_default().push(self.history.len());
                    self.record(unit, Access::Write(value), op.start, None);
                }
            }
        }
    }

    fn record(&mut self, unit: u64, access: Access, start: u64, end: Option<u64>) {
        let acked = end.is_some();
        self.history.push(HistoryOp { unit, worker: self.index, access, start, end, acked });
    }

    fn model(&mut self, unit: u64) -> Option<&mut UnitModel> {
        let private = unit.checked_sub(self.options.shared_units)?;
        let own = private.checked_sub(self.index * self.options.private_units)?;
        self.models.get_mut(usize::try_from(own).ok()?)
    }
}
