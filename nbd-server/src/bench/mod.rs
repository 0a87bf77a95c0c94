//! The load generator: makes one kind of load on an NBD export and measures it.
//!
//! For every server alike: it speaks plain NBD with simple replies, over a unix socket or TCP, on one
//! thread. Everything is allocated before the first request; in the loop there is no allocation, and at a
//! depth above one several requests go out, and several replies come in, with one system call.
//!
//! It overwrites what is stored, so it refuses to write unless [`BenchOptions::destroys_data`] is set. It
//! never checks what it reads: tests do that. A request that fails ends the run, because a measurement of
//! errors would mean nothing. Every run is bounded, by time always, by a count where one is given.
//!
//! ```text
//! job         what is done: pattern, sizes, the next place        (pure)
//! recorder    warm-up, measurement, end; histograms               (pure but for the CPU time it asks for)
//! connection  one connection's requests in flight, sends, replies
//! cpu         CPU time of the server's processes, from /proc
//! report      what came out
//! ```

mod connection;
mod cpu;
mod job;
mod recorder;
mod report;

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

pub use cpu::{CpuMeter, CpuSample};
pub use job::{Job, Pattern, Spread};
pub use report::{BenchReport, LatencyReport};

use crate::client::{ClientOptions, ExportFacts, NbdError, connect_raw};
use crate::proto;
use crate::uri::NbdUri;
use connection::Connection;
use job::Places;
use recorder::Recorder;

/// Most connections of one run.
pub const CONNECTIONS_MAX: usize = 256;
/// Most requests in flight on one connection.
pub const DEPTH_MAX: usize = 4096;
/// Longest read or write, in bytes: what every NBD client may count on.
pub const BLOCK_SIZE_MAX: u32 = proto::PAYLOAD_MAX_DEFAULT;
/// Longest run, warm-up and measurement each.
pub const TIME_MAX: Duration = Duration::from_secs(24 * 3600);
/// A server that answers nothing for so long is given up.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// One run.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// What is done.
    pub job: Job,
    /// Connections, each with its own requests in flight.
    pub connections: usize,
    /// Operations in flight on each connection.
    pub depth: usize,
    /// Time before anything is measured.
    pub warm_up: Duration,
    /// Longest time that is measured.
    pub time: Duration,
    /// Operations after which the measurement ends before its time.
    pub count: Option<u64>,
    /// First byte that is touched.
    pub offset: u64,
    /// Bytes from there on that are touched; all there are if not given.
    pub area: Option<u64>,
    /// How the area lies, if not in one piece; its pieces have to fit.
    pub spread: Option<Spread>,
    /// Decides the random places and the content.
    pub seed: u64,
    /// Processes of the server, whose CPU time is measured.
    pub pids: Vec<u32>,
    /// Confirms that what the area holds may be overwritten. Without it a job that writes is refused.
    pub destroys_data: bool,
}

impl BenchOptions {
    /// `job` on one connection for ten seconds, reads only.
    #[must_use]
    pub fn new(job: Job, depth: usize) -> Self {
        Self {
            job,
            connections: 1,
            depth,
            warm_up: Duration::from_secs(1),
            time: Duration::from_secs(10),
            count: None,
            offset: 0,
            area: None,
            spread: None,
            seed: 1,
            pids: Vec::new(),
            destroys_data: false,
        }
    }
}

/// Makes the load and measures it.
///
/// # Errors
/// [`NbdError::Usage`] for what cannot be done to this export, and for a job that writes without leave;
/// [`NbdError::Server`] as soon as a request fails; otherwise the connection is over.
pub fn run(uri: &NbdUri, options: &BenchOptions) -> Result<BenchReport, NbdError> {
    check_options(options)?;
    let mut socks = Vec::with_capacity(options.connections);
    let mut facts = None;
    for _ in 0..options.connections {
        let (sock, seen) = connect_raw(uri, ClientOptions::default())?;
        set_blocking(&sock)?;
        socks.push(sock);
        facts = Some(seen);
    }
    let facts = facts.ok_or_else(|| usage("at least one connection is needed"))?;
    let area = check_export(options, &facts)?;
    let payload = content(options.seed, options.job.block_size as usize);
    let places = Places::new(options.job, options.offset, area, options.seed).spread(options.spread);
    let mut recorder = Recorder::new(options, places, CpuMeter::new(&options.pids)?)?;
    let mut connections: Vec<_> =
        socks.iter().map(|_| Connection::new(options.job, options.depth, &payload)).collect();
    let now = Instant::now();
    for connection in &mut connections {
        connection.start_all(&mut recorder, now);
    }
    match (socks.as_slice(), connections.as_mut_slice()) {
        ([sock], [connection]) => run_one(sock, connection, &mut recorder)?,
        (socks, connections) => run_many(socks, connections, &mut recorder)?,
    }
    for (sock, connection) in socks.iter().zip(&connections) {
        connection.say_goodbye(sock);
    }
    Ok(recorder.report(area))
}

/// The loop of a single connection: with nothing left to send it waits in the receive itself.
fn run_one(sock: &OwnedFd, connection: &mut Connection<'_>, recorder: &mut Recorder) -> Result<(), NbdError> {
    while !connection.is_idle() {
        connection.send(sock)?;
        if connection.wants_to_send() {
            poll_ready(&mut [PollFd::new(sock, PollFlags::IN | PollFlags::OUT)])?;
            connection.receive(sock, false, recorder)?;
        } else if !connection.receive(sock, true, recorder)? {
            return Err(NbdError::TimedOut("an answer"));
        }
    }
    Ok(())
}

fn run_many(
    socks: &[OwnedFd],
    connections: &mut [Connection<'_>],
    recorder: &mut Recorder,
) -> Result<(), NbdError> {
    let mut polled: Vec<PollFd<'_>> = Vec::with_capacity(socks.len());
    while connections.iter().any(|connection| !connection.is_idle()) {
        polled.clear();
        for (sock, connection) in socks.iter().zip(connections.iter_mut()) {
            connection.send(sock)?;
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, !connection.is_idle());
            flags.set(PollFlags::OUT, connection.wants_to_send());
            polled.push(PollFd::new(sock, flags));
        }
        poll_ready(&mut polled)?;
        for (index, connection) in connections.iter_mut().enumerate() {
            if !(polled[index].revents() & !PollFlags::OUT).is_empty() && !connection.is_idle() {
                connection.receive(&socks[index], false, recorder)?;
            }
        }
    }
    Ok(())
}

fn poll_ready(polled: &mut [PollFd<'_>]) -> Result<(), NbdError> {
    let limit = Timespec::try_from(ANSWER_LIMIT).ok();
    loop {
        match rustix::event::poll(polled, limit.as_ref()) {
            Ok(0) => return Err(NbdError::TimedOut("an answer")),
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(NbdError::Disconnected(e.to_string())),
        }
    }
}

/// Receives wait by themselves, so that a lone request costs two system calls; sends never do.
fn set_blocking(sock: &OwnedFd) -> Result<(), NbdError> {
    let broken = |e: rustix::io::Errno| NbdError::Disconnected(e.to_string());
    rustix::io::ioctl_fionbio(sock, false).map_err(broken)?;
    rustix::net::sockopt::set_socket_timeout(sock, rustix::net::sockopt::Timeout::Recv, Some(ANSWER_LIMIT))
        .map_err(broken)
}

fn usage(text: impl Into<String>) -> NbdError {
    NbdError::Usage(text.into())
}

fn check_options(options: &BenchOptions) -> Result<(), NbdError> {
    let job = &options.job;
    if job.writes() && !options.destroys_data {
        return Err(usage(
            "this job writes and would overwrite what the volume holds; nothing was done. If the data may be \
             lost, say so (--destroys-data)",
        ));
    }
    if job.block_size == 0 || job.block_size > BLOCK_SIZE_MAX {
        return Err(usage(format!("a block size of {} bytes; 1 to {BLOCK_SIZE_MAX} are", job.block_size)));
    }
    if job.read_percent > 100 {
        return Err(usage("more than 100 % reads"));
    }
    if let Some(Spread { piece, distance }) = options.spread
        && (piece == 0 || !piece.is_multiple_of(u64::from(job.block_size)) || distance < piece)
    {
        return Err(usage(format!(
            "pieces of {piece} bytes every {distance}, in blocks of {}",
            job.block_size
        )));
    }
    if options.connections == 0 || options.connections > CONNECTIONS_MAX {
        return Err(usage(format!("{} connections; 1 to {CONNECTIONS_MAX} are", options.connections)));
    }
    if options.depth == 0 || options.depth > DEPTH_MAX {
        return Err(usage(format!("a depth of {}; 1 to {DEPTH_MAX} are possible", options.depth)));
    }
    if options.warm_up > TIME_MAX || options.time > TIME_MAX || options.time.is_zero() {
        return Err(usage("a run takes more than no time and at most a day"));
    }
    Ok(())
}

/// Bytes of the area, if the export can do what the job asks for.
fn check_export(options: &BenchOptions, facts: &ExportFacts) -> Result<u64, NbdError> {
    let job = &options.job;
    let left = facts.size.saturating_sub(options.offset);
    let area = options.area.unwrap_or(left);
    let reach = options.spread.map_or(area, |spread| spread.reach(area));
    if reach > left || area < u64::from(job.block_size) {
        return Err(usage(format!(
            "an area of {area} bytes from byte {} on, in blocks of {}: the export has {} bytes",
            options.offset, job.block_size, facts.size
        )));
    }
    if let Some([smallest, _, largest]) = facts.block_sizes {
        let smallest = smallest.max(1);
        if job.block_size > largest
            || !job.block_size.is_multiple_of(smallest)
            || !options.offset.is_multiple_of(u64::from(smallest))
        {
            return Err(usage(format!(
                "the server takes multiples of {smallest} bytes, at most {largest} at once"
            )));
        }
    }
    let has = |flag: u16| facts.flags & proto::NBD_FLAG_HAS_FLAGS != 0 && facts.flags & flag != 0;
    if job.writes() && has(proto::NBD_FLAG_READ_ONLY) {
        return Err(usage("the export is read-only"));
    }
    if job.writes() && job.flush_after_write && !has(proto::NBD_FLAG_SEND_FLUSH) {
        return Err(usage("the server knows no flush"));
    }
    if job.writes() && job.fua && !has(proto::NBD_FLAG_SEND_FUA) {
        return Err(usage("the server knows no FUA"));
    }
    Ok(area)
}

/// What is written: bytes that do not compress, the same for every request.
fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut random = job::Random::new(seed ^ 0x636f_6e74_656e_7400);
    let mut out = Vec::with_capacity(len.next_multiple_of(8));
    while out.len() < len {
        out.extend_from_slice(&random.next().to_le_bytes());
    }
    out.truncate(len);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> ExportFacts {
        let flags = proto::NBD_FLAG_HAS_FLAGS | proto::NBD_FLAG_SEND_FLUSH | proto::NBD_FLAG_SEND_FUA;
        ExportFacts { size: 1 << 20, flags, block_sizes: Some([512, 4096, 65536]), lineage: None }
    }

    fn write_options() -> BenchOptions {
        let job = Job { read_percent: 0, ..Job::default() };
        BenchOptions { destroys_data: true, ..BenchOptions::new(job, 1) }
    }

    #[test]
    fn a_job_that_writes_needs_leave() {
        let mut options = write_options();
        assert!(check_options(&options).is_ok());
        options.destroys_data = false;
        let text = check_options(&options).unwrap_err().to_string();
        assert!(text.contains("--destroys-data"), "{text}");
        options.job.read_percent = 100;
        assert!(check_options(&options).is_ok(), "reads do no harm");
    }

    #[test]
    fn what_cannot_be_done_is_refused_before_it_is_tried() {
        type Change = fn(&mut BenchOptions);
        let wrong: [Change; 12] = [
            |o| o.connections = 0,
            |o| o.connections = CONNECTIONS_MAX + 1,
            |o| o.depth = 0,
            |o| o.depth = DEPTH_MAX + 1,
            |o| o.job.block_size = 0,
            |o| o.job.block_size = BLOCK_SIZE_MAX + 1,
            |o| o.job.read_percent = 101,
            |o| o.time = Duration::ZERO,
            |o| o.spread = Some(Spread { piece: 0, distance: 4096 }),
            |o| o.spread = Some(Spread { piece: 6144, distance: 1 << 20 }),
            |o| o.spread = Some(Spread { piece: 8192, distance: 4096 }),
            |o| o.warm_up = TIME_MAX + Duration::from_secs(1),
        ];
        for change in wrong {
            let mut options = write_options();
            change(&mut options);
            assert!(matches!(check_options(&options), Err(NbdError::Usage(_))), "{options:?}");
        }
    }

    #[test]
    fn the_area_and_the_request_have_to_fit_the_export() {
        assert_eq!(check_export(&write_options(), &facts()).unwrap(), 1 << 20);
        type Change = fn(&mut BenchOptions, &mut ExportFacts);
        let wrong: [Change; 9] = [
            |o, _| o.area = Some((1 << 20) + 1),
            |o, _| (o.area, o.spread) = (Some(8192), Some(Spread { piece: 4096, distance: 1 << 20 })),
            |o, _| o.offset = 1 << 20,
            |o, _| o.area = Some(4095),
            |o, _| o.job.block_size = 131_072,
            |o, _| o.job.block_size = 100,
            |_, f| f.flags |= proto::NBD_FLAG_READ_ONLY,
            |o, f| (o.job.flush_after_write, f.flags) = (true, proto::NBD_FLAG_HAS_FLAGS),
            |o, f| (o.job.fua, f.flags) = (true, proto::NBD_FLAG_HAS_FLAGS),
        ];
        for change in wrong {
            let (mut options, mut facts) = (write_options(), facts());
            change(&mut options, &mut facts);
            assert!(matches!(check_export(&options, &facts), Err(NbdError::Usage(_))), "{options:?}");
        }
    }

    #[test]
    fn content_is_decided_by_the_seed() {
        assert_eq!(content(1, 4097).len(), 4097);
        assert_eq!(content(1, 64), content(1, 64));
        assert_ne!(content(1, 64), content(2, 64));
    }
}
