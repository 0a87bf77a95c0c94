//! The checker itself: synthetic histories that are wrong in one way each must be found, right ones not.

use super::*;

const ONE: (u64, u64) = (0, 1);

fn write(h: &mut History, asked: Time, answered: Time) -> usize {
    let op = h.ask(0, OpKind::Write, ONE, false, asked, None);
    if answered != NEVER {
        h.released(op, false);
        h.answered(op, answered, Vec::new());
    }
    op
}

fn read(h: &mut History, asked: Time, answered: Time, value: u64) {
    let op = h.ask(1, OpKind::Read, ONE, false, asked, None);
    h.answered(op, answered, vec![value]);
}

fn flush(h: &mut History, asked: Time, answered: Time) {
    let op = h.ask(0, OpKind::Flush, (0, 0), false, asked, None);
    h.released(op, false);
    h.answered(op, answered, Vec::new());
}

#[test]
fn what_fits_is_accepted() {
    let mut h = History::new(8);
    read(&mut h, 1, 2, 0);
    let a = write(&mut h, 10, 20);
    read(&mut h, 12, 14, 0);
    read(&mut h, 13, 15, tag(a, 0));
    read(&mut h, 30, 31, tag(a, 0));
    let lost = write(&mut h, 40, NEVER);
    read(&mut h, 50, 51, tag(a, 0));
    read(&mut h, 60, 61, tag(lost, 0));
    h.check().unwrap();
}

#[test]
fn a_lost_write_is_found() {
    let mut h = History::new(8);
    let a = write(&mut h, 10, 20);
    write(&mut h, 30, 40);
    read(&mut h, 50, 51, tag(a, 0));
    h.check().unwrap_err();
    let mut h = History::new(8);
    write(&mut h, 10, 20);
    read(&mut h, 50, 51, 0);
    h.check().unwrap_err();
}

#[test]
fn a_stale_read_is_found() {
    let mut h = History::new(8);
    let a = write(&mut h, 10, 20);
    let b = write(&mut h, 30, 90);
    read(&mut h, 40, 45, tag(b, 0));
    read(&mut h, 50, 55, tag(a, 0));
    h.check().unwrap_err();
}

#[test]
fn an_unanswered_write_takes_effect_once() {
    let mut h = History::new(8);
    let a = write(&mut h, 10, NEVER);
    let b = write(&mut h, 30, 40);
    read(&mut h, 20, 25, tag(a, 0));
    read(&mut h, 50, 55, tag(b, 0));
    h.check().unwrap();
    read(&mut h, 60, 65, tag(a, 0));
    h.check().unwrap_err();
}

#[test]
fn r24_what_was_done_again_does_not_come_back() {
    let mut h = History::new(8);
    let a = write(&mut h, 10, NEVER);
    let again = h.ask(0, OpKind::Write, ONE, false, 20, Some(a));
    h.released(again, false);
    h.answered(again, 30, Vec::new());
    let b = write(&mut h, 40, 50);
    read(&mut h, 52, 53, tag(b, 0));
    h.check().unwrap();
    assert!(h.outdated(0, tag(a, 0)).is_some());
    read(&mut h, 60, 61, tag(a, 0));
    h.check().unwrap_err();
}

#[test]
fn a_torn_or_misplaced_or_foreign_sector_is_found() {
    let mut h = History::new(8);
    let op = h.ask(0, OpKind::Write, (0, 2), false, 10, None);
    h.answered(op, 20, Vec::new());
    let r = h.ask(1, OpKind::Read, (0, 2), false, 30, None);
    h.answered(r, 31, vec![tag(op, 0), 0]);
    h.check().unwrap_err();
    let mut h = History::new(8);
    let op = write(&mut h, 10, 20);
    read(&mut h, 30, 31, tag(op, 1));
    h.check().unwrap_err();
    let mut h = History::new(8);
    read(&mut h, 30, 31, tag(77, 0));
    h.check().unwrap_err();
}

#[test]
fn what_was_flushed_survives_the_end_of_the_promise_and_the_rest_may_not() {
    let mut h = History::new(8);
    let a = write(&mut h, 10, 20);
    flush(&mut h, 30, 40);
    let b = write(&mut h, 50, 60);
    h.promise_ends(70, false);
    assert!(h.outdated(0, tag(a, 0)).is_none() && h.outdated(0, 0).is_some());
    read(&mut h, 80, 81, tag(a, 0));
    h.check().unwrap();
    read(&mut h, 90, 91, tag(b, 0));
    h.check().unwrap_err();
    let mut h = History::new(8);
    write(&mut h, 10, 20);
    flush(&mut h, 30, 40);
    h.promise_ends(70, false);
    read(&mut h, 80, 81, 0);
    h.check().unwrap_err();
}

#[test]
fn a_flush_covers_what_was_acknowledged_before_it_was_asked_for() {
    let mut h = History::new(8);
    let a = write(&mut h, 10, 20);
    let f = h.ask(0, OpKind::Flush, (0, 0), false, 25, None);
    write(&mut h, 30, 35);
    h.released(f, false);
    h.answered(f, 40, Vec::new());
    h.promise_ends(50, false);
    assert!(h.outdated(0, 0).is_some() && h.outdated(0, tag(a, 0)).is_none());
}

#[test]
fn zeroes_are_found_where_none_were_written() {
    let mut h = History::new(8);
    let a = write(&mut h, 10, 20);
    let z = h.ask(0, OpKind::Zero, ONE, false, 30, None);
    h.released(z, false);
    h.answered(z, 40, Vec::new());
    read(&mut h, 50, 51, 0);
    h.check().unwrap();
    assert!(h.outdated(0, tag(a, 0)).is_some());
    write(&mut h, 60, 70);
    read(&mut h, 80, 81, 0);
    h.check().unwrap_err();
}

#[test]
fn falsified_content_is_excused_and_counted() {
    let mut h = History::new(8);
    write(&mut h, 10, 20);
    read(&mut h, 50, 51, ROT | 5);
    h.check().unwrap();
    assert_eq!(h.excused_reads, 1);
}

/// All orders of a small history are tried; the fast check has to agree.
#[test]
fn the_fast_check_agrees_with_trying_every_order() {
    let mut rng = crate::rng::Rng::new(11);
    let (mut good, mut bad) = (0, 0);
    for _ in 0..4000 {
        let mut h = History::new(8);
        let (writes, reads) = (1 + rng.below(3), 1 + rng.below(3));
        for _ in 0..writes {
            let asked = rng.below(40);
            let answered = if rng.chance(250) { NEVER } else { asked + 1 + rng.below(20) };
            write(&mut h, asked, answered);
        }
        for _ in 0..reads {
            let asked = rng.below(60);
            let from = rng.below(writes);
            read(&mut h, asked, asked + 1 + rng.below(20), tag(at(from), 0));
        }
        let expected = any_order(&h, &mut Vec::new(), u64::MAX);
        assert_eq!(h.check().is_ok(), expected, "{:#?}", h.ops);
        if expected { good += 1 } else { bad += 1 }
    }
    assert!(good > 200 && bad > 200, "{good} {bad}");
}

/// True if the operations not yet `done` can follow in some order, the register holding `value`. Writes
/// without an answer may be left out.
fn any_order(h: &History, done: &mut Vec<usize>, value: u64) -> bool {
    let open: Vec<usize> = (0..h.ops.len()).filter(|n| !done.contains(n)).collect();
    if open.iter().all(|n| h.ops[*n].answered == NEVER) {
        return true;
    }
    let first_end = open.iter().map(|n| h.ops[*n].answered).min().unwrap_or(NEVER);
    for n in open {
        let op = &h.ops[n];
        if op.asked > first_end {
            continue;
        }
        let next = match op.kind {
            OpKind::Write => tag(n, 0),
            _ if op.values[0] == value => value,
            _ => continue,
        };
        done.push(n);
        let fits = any_order(h, done, next);
        done.pop();
        if fits {
            return true;
        }
    }
    false
}
