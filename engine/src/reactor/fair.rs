//! What one client connection may have while others want some, too.
//!
//! Two things run short: the client bytes of a volume, and the time of its thread and its disk. A connection alone
//! has all that it can use. Where several are at work, each has a window of requests, so that none finds more than
//! that of every other before it; and what a connection holds of the client bytes is never more than what it
//! leaves, so that however much the greedy ones hold, there is something for one that comes. What a connection asks
//! for first, if it is small, it has in any case.
//!
//! Pure: numbers in, a verdict out.

/// Most requests of one connection that are not answered (and the answer sent); then it is not read.
pub(super) const REQUESTS_MAX: u32 = 256;
/// The same while another connection has requests that are not answered. Enough to keep a disk busy.
pub(super) const REQUESTS_SHARED_MAX: u32 = 64;

/// Longest request, in client bytes, that a connection with nothing in flight has taken at once, whatever others hold
/// of the client bytes. So hoarders, however many, cannot stop a client that asks for one small thing at a time; and
/// what is taken beyond the bound is at most this for each connection, 64 MiB in all.
pub(super) const FIRST_LEN_MAX: u64 = 64 << 10;

/// Most requests of each connection, where so many connections have some that are not answered.
pub(super) fn window(busy: usize) -> u32 {
    if busy > 1 { REQUESTS_SHARED_MAX } else { REQUESTS_MAX }
}

/// Whether a connection that holds `held` client bytes may take `len` more of the `free` ones, as far as its own
/// share goes. One that holds nothing may take what there is.
pub(super) fn within_share(held: u64, len: u64, free: u64) -> bool {
    // Neither sum can overflow: each number is at most the volume's bound, or one request's length.
    held == 0 || held + len + len <= free
}

/// Whether a request is taken beyond the bound.
pub(super) fn is_first_and_small(held: u64, len: u64) -> bool {
    held == 0 && len <= FIRST_LEN_MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// How many requests of `len` each of some connections gets, one after the other, until none gets any more.
    fn shares(connections: usize, len: u64, mut free: u64) -> Vec<u64> {
        let mut held = vec![0; connections];
        loop {
            let before = free;
            for held in &mut held {
                if len <= free && within_share(*held, len, free) {
                    *held += len;
                    free -= len;
                }
            }
            if free == before {
                return held;
            }
        }
    }

    #[test]
    fn one_alone_has_half_and_each_more_leaves_as_much_as_it_has() {
        assert_eq!(shares(1, MIB, 256 * MIB), [128 * MIB]);
        for connections in 2..20 {
            let held = shares(connections, MIB / 16, 256 * MIB);
            let left = 256 * MIB - held.iter().sum::<u64>();
            assert!(held.iter().all(|held| *held <= left), "{held:?} of {left}");
            assert!(left <= 2 * 256 * MIB / connections as u64, "nothing is kept for nobody: {left}");
        }
    }

    #[test]
    fn what_is_left_takes_one_more_request_of_a_connection_that_has_nothing() {
        let free = 256 * MIB - shares(6, 32 * MIB, 256 * MIB).iter().sum::<u64>();
        assert!(free >= 32 * MIB, "{free}");
    }

    #[test]
    fn a_window_is_whole_for_one_alone() {
        assert_eq!((window(0), window(1), window(2), window(1000)), (256, 256, 64, 64));
    }
}
