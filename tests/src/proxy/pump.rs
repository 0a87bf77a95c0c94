//! One direction of one connection: reads a piece, lets the link's faults have their way with it, writes it.
//!
//! A pump ends when its stream does, when the connection is broken, or when the proxy ends; it never waits
//! for anything without looking at those again within [`LOOK`].

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Connection, Direction, Shared, Traffic};

/// Longest time between two looks at what changed.
const LOOK: Duration = Duration::from_millis(20);
const PIECE: usize = 64 << 10;

/// Ends a stream with a reset, now and in both directions; the descriptor closes with its owner.
pub(super) fn reset(stream: &TcpStream) {
    // A connection to nowhere: the kernel breaks the present one with a reset, whoever holds the socket.
    let _ = rustix::net::connect_unspec(stream);
}

/// Waits until what the dialer sends may go on; false if the connection is to be reset instead.
pub(super) fn wait_open(dialer: &TcpStream, shared: &Shared) -> bool {
    let mut state = shared.lock();
    loop {
        if state.ended || state.condition.refused {
            return false;
        }
        if !state.condition.silent_forward {
            return true;
        }
        if hung_up(dialer) {
            return false;
        }
        state = shared.changed.wait_timeout(state, LOOK).unwrap_or_else(std::sync::PoisonError::into_inner).0;
    }
}

/// What becomes of a piece.
enum Fate {
    Whole,
    Cut,
    Over,
}

/// Runs one direction to its end.
pub(super) fn run(connection: &Connection, direction: Direction, shared: &Shared) {
    carry(connection, direction, shared);
    if connection.pumps.fetch_sub(1, Ordering::SeqCst) == 1 {
        connection.finish();
    }
}

fn carry(connection: &Connection, direction: Direction, shared: &Shared) {
    let (mut from, mut to) = match direction {
        Direction::Forward => (&connection.dialer, &connection.listener),
        Direction::Back => (&connection.listener, &connection.dialer),
    };
    let _ = from.set_read_timeout(Some(LOOK));
    let _ = to.set_write_timeout(Some(LOOK));
    let mut piece = vec![0; PIECE];
    while !connection.is_over() {
        let len = match from.read(&mut piece) {
            Ok(len) => len,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => continue,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(_) => {
                // One end was reset; the other hears of it once the link carries that.
                // If one end is to hear nothing, the connection is over for us already.
                if matches!(wait(connection, direction, shared, Duration::ZERO), Fate::Whole) {
                    connection.finish();
                    reset(to);
                }
                return;
            }
        };
        let fate = treat(connection, direction, shared, &mut piece[..len]);
        let send = match fate {
            Fate::Whole => len,
            Fate::Cut => len / 2,
            Fate::Over => return,
        };
        let left_behind = || shared.traffic == Traffic::Nbd && hung_up(&connection.dialer);
        if !write_all(&mut to, &piece[..send], || connection.is_over() || left_behind()) {
            // Somebody else has ended it, and decided who hears of that.
            if !connection.is_over() {
                connection.finish();
                reset(to);
                reset(from);
            }
            return;
        }
        if matches!(fate, Fate::Cut) {
            connection.finish();
            let _ = (to.shutdown(Shutdown::Both), from.shutdown(Shutdown::Both));
            return;
        }
        if len == 0 {
            let _ = to.shutdown(Shutdown::Write);
            return;
        }
    }
}

/// Holds a piece back as long as the link says, and damages it if that is due.
fn treat(connection: &Connection, direction: Direction, shared: &Shared, piece: &mut [u8]) -> Fate {
    let (delay, rate) = {
        let state = shared.lock();
        (state.condition.delay, state.condition.rate)
    };
    let micros = (piece.len() as u64 * 1_000_000).checked_div(rate).unwrap_or(0);
    let paced = Duration::from_micros(micros);
    if matches!(wait(connection, direction, shared, delay + paced), Fate::Over) {
        return Fate::Over;
    }
    if piece.is_empty() {
        return Fate::Whole;
    }
    let mut state = shared.lock();
    let way = direction as usize;
    if state.corrupt[way] > 0 {
        state.corrupt[way] -= 1;
        let (byte, bit) = (state.random.below(piece.len() as u64), state.random.below(8));
        piece[usize::try_from(byte).unwrap_or(0)] ^= 1 << bit;
    }
    if state.truncate[way] > 0 {
        state.truncate[way] -= 1;
        return Fate::Cut;
    }
    Fate::Whole
}

/// Waits `pause`, and then as long as the direction is silent.
fn wait(connection: &Connection, direction: Direction, shared: &Shared, pause: Duration) -> Fate {
    let until = Instant::now() + pause;
    let mut state = shared.lock();
    loop {
        if connection.is_over() || state.ended {
            return Fate::Over;
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() && !state.condition.silent(direction) {
            return Fate::Whole;
        }
        // A client that is gone takes with it what was not delivered, and its server hears of it.
        if shared.traffic == Traffic::Nbd && hung_up(&connection.dialer) {
            connection.finish();
            reset(&connection.listener);
            return Fate::Over;
        }
        let nap = if left.is_zero() { LOOK } else { left.min(LOOK) };
        state = shared.changed.wait_timeout(state, nap).unwrap_or_else(std::sync::PoisonError::into_inner).0;
    }
}

fn write_all(to: &mut &TcpStream, mut bytes: &[u8], give_up: impl Fn() -> bool) -> bool {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(0) => return false,
            Ok(len) => bytes = &bytes[len..],
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if give_up() {
                    return false;
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return false,
        }
    }
    true
}

/// True if the other end of a stream has closed or reset it.
fn hung_up(stream: &TcpStream) -> bool {
    let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    let mut fds = [PollFd::from_borrowed_fd(stream.as_fd(), gone)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0) && fds[0].revents().intersects(gone)
}
