//! Cases on the transmission phase: what each command does, which requests are refused and how, and what ends a
//! connection. Every reply has been judged by the rules of its form when a case sees it.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use blkrepl_tests::nbd::spec::*;
use blkrepl_tests::nbd::{Form, Reply, Request, Session};

use super::{AREA, SIZE, Target, cases};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const MAX: u64 = 32 * MIB;
const ALLOCATION: &str = "base:allocation";
const DIRTY: &str = "blkrepl:dirty";

cases! {
    Each:
        what_was_written_is_read,
        any_alignment_works,
        the_largest_payload_is_taken,
        longer_payloads_are_refused_and_thrown_away,
        a_flush_takes_no_range,
        a_flush_holds_for_all_connections,
        fua_is_accepted_on_every_command,
        trimmed_bytes_read_as_zeroes,
        written_zeroes_read_as_zeroes,
        zeroes_may_be_longer_than_a_payload,
        fast_zeroes_are_made_or_refused_at_once,
        a_cache_request_changes_nothing,
        past_the_end_is_refused,
        an_offset_and_length_that_overflow_are_refused,
        a_length_of_zero_is_refused,
        unknown_commands_are_refused,
        flags_of_other_commands_are_refused,
        block_status_without_a_context_is_refused,
        a_wrong_magic_closes,
        cookies_are_any_number_and_may_be_used_again,
        many_requests_in_flight_are_each_answered_once,
        a_goodbye_is_answered_by_all_that_is_in_flight,
        a_request_byte_by_byte_is_understood,
        a_write_that_does_not_arrive_whole_is_none,
        a_client_that_is_gone_leaves_the_others_alone;
    Chunks:
        dont_fragment_brings_one_piece,
        block_status_describes_the_range,
        one_descriptor_is_brought_where_one_is_asked_for,
        holes_read_as_zeroes;
    Extended:
        a_write_needs_the_flag_of_its_payload,
        payloads_that_do_not_belong_are_refused_and_thrown_away,
        a_payload_of_4_gib_closes;
}

/// Bytes that differ from place to place.
fn pattern(seed: u64, len: u64) -> Vec<u8> {
    (0..len).map(|at| ((at / 509 + at * 7 + seed * 31) % 251) as u8 + 1).collect()
}

fn read(offset: u64, len: u64) -> Request {
    Request::new(NBD_CMD_READ, 0, offset, len)
}

/// A connection with both contexts, and the number of `base:allocation`.
fn with_contexts(target: &Target<'_>) -> Result<(Session, u32)> {
    let mut talk = target.talk()?;
    let numbers = talk.choose(target.export, &[ALLOCATION, DIRTY])?;
    Ok((talk.go(target.export)?.0, numbers[0]))
}

fn what_was_written_is_read(target: &Target<'_>) -> Result<()> {
    let mut session = target.session()?;
    for (n, len) in [512, 4096, 65_536, 3 * MIB].into_iter().enumerate() {
        let data = pattern(n as u64, len);
        session.write(8 * MIB + len, &data)?;
        ensure!(session.read(8 * MIB + len, len)? == data, "{len} bytes");
    }
    Ok(())
}

fn any_alignment_works(target: &Target<'_>) -> Result<()> {
    let mut session = target.session()?;
    let base = 2 * MIB;
    let mut model = pattern(1, 64 * KIB);
    session.write(base, &model)?;
    for (at, len) in
        [(1, 1), (511, 2), (4095, 4098), (8191, 1), (12_289, 8191), (65_535, 1), (20_000, 30_011)]
    {
        let data = pattern(at ^ len, len);
        session.write(base + at, &data)?;
        model[at as usize..(at + len) as usize].copy_from_slice(&data);
        let (from, span) = (at / 2, (64 * KIB - at / 2).min(len + at));
        let expected = &model[from as usize..(from + span) as usize];
        ensure!(session.read(base + from, span)? == expected, "{span} bytes at {from}");
    }
    for (command, at, len) in [(NBD_CMD_TRIM, 4097, 5000), (NBD_CMD_WRITE_ZEROES, 40_001, 8191)] {
        session.done(Request::new(command, 0, base + at, len))?;
        model[at as usize..(at + len) as usize].fill(0);
    }
    ensure!(session.read(base, 64 * KIB)? == model, "after a trim and zeroes");
    Ok(())
}

fn the_largest_payload_is_taken(target: &Target<'_>) -> Result<()> {
    let mut session = target.session()?;
    let data = pattern(MAX, MAX);
    session.write(AREA - MAX, &data)?;
    ensure!(session.read(AREA - MAX, MAX)? == data, "32 MiB");
    Ok(())
}

fn longer_payloads_are_refused_and_thrown_away(target: &Target<'_>) -> Result<()> {
    let mut session = target.session()?;
    session.write(0, &[0x77; 4096])?;
    session.fails(read(0, MAX + 1), NBD_EINVAL)?;
    session.fails(read(0, u64::from(u32::MAX)), NBD_EINVAL)?;
    session.fails(Request::write(target.form, 0, &vec![1; MAX as usize + 4096]), NBD_EINVAL)?;
    ensure!(session.read(0, 4096)? == [0x77; 4096], "a refused write has written");
    Ok(())
}

fn a_flush_takes_no_range(target: &Target<'_>) -> Result<()> {
    let mut session = target.session()?;
    session.write(0, &[1; 512])?;
    session.done(Request::new(NBD_CMD_FLUSH, 0, 0, 0))?;
    for (offset, len) in [(0, 4096), (4096, 0), (u64::MAX, 0)] {
        session.fails(Request::new(NBD_CMD_FLUSH, 0, offset, len), NBD_EINVAL)?;
    }
    session.done(Request::new(NBD_CMD_FLUSH, 0, 0, 0)).map(drop)
}

fn a_flush_holds_for_all_connections(target: &Target<'_>) -> Result<()> {
    let (mut one, mut other) = (target.session()?, target.session()?);
    let data = pattern(9, 16 * KIB);
    one.write(3 * MIB, &data)?;
    other.done(Request::new(NBD_CMD_FLUSH, 0, 0, 0))?;
    ensure!(other.read(3 * MIB, 16 * KIB)? == data, "what another connection wrote");
    Ok(())
}

fn fua_is_accepted_on_every_command(target: &Target<'_>) -> Result<()> {
    let mut session = target.session()?;
    let data = pattern(2, 8192);
    session.done(Request::write(target.form, MIB, &data).flagged(NBD_CMD_FLAG_FUA))?;
    ensure!(session.done(read(MIB, 8192).flagged(NBD_CMD_FLAG_FUA))?.data == data, "read with FUA");
    session.done(Request::new(NBD_CMD_TRIM, NBD_CMD_FLAG_FUA, MIB, 4096))?;
    session.done(Request::new(NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_FUA, MIB + 4096, 2048))?;
    session.done(Request::new(NBD_CMD_CACHE, NBD_CMD_FLAG_FUA, MIB, 4096))?;
    session.done(Request::new(NBD_CMD_FLUSH, NBD_CMD_FLAG_FUA, 0, 0))?;
    let expected = [&[0; 6144][..], &data[6144..]].concat();
    ensure!(session.read(MIB, 8192)? == expected, "what was trimmed, zeroed, and left");
    if target.form.chunks() {
        let (mut session, _) = with_contexts(target)?;
        session.done(Request::new(NBD_CMD_BLOCK_STATUS, NBD_CMD_FLAG_FUA, 0, 4096))?;
    }
    Ok(())
}

fn trimmed_bytes_read_as_zeroes(target: &Target<'_>) -> Result<()> {
    zeroed(target, NBD_CMD_TRIM, 0)
}

fn written_zeroes_read_as_zeroes(target: &Target<'_>) -> Result<()> {
    zeroed(target, NBD_CMD_WRITE_ZEROES, 0)?;
    zeroed(target, NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_NO_HOLE)
}

/// What a command leaves that makes zeroes, and that it leaves the neighbours alone.
fn zeroed(target: &Target<'_>, command: u16, flags: u16) -> Result<()> {
    let mut session = target.session()?;
    let len = 2 * MIB;
    let mut model = pattern(3, len);
    session.write(16 * MIB, &model)?;
    for (at, len) in [(64 * KIB, 1 << 20), (1, 1), (1_700_001, 70_001)] {
        session.done(Request::new(command, flags, 16 * MIB + at, len))?;
        model[at as usize..(at + len) as usize].fill(0);
    }
    ensure!(session.read(16 * MIB, len)? == model, "command {command} with flags {flags:#x}");
    Ok(())
}

fn zeroes_may_be_longer_than_a_payload(target: &Target<'_>) -> Result<()> {
    let mut session = target.session()?;
    for command in [NBD_CMD_WRITE_ZEROES, NBD_CMD_TRIM, NBD_CMD_CACHE] {
        session.write(40 * MIB, &[0x5a; 4096])?;
        session.done(Request::new(command, 0, MIB, MAX + 8 * MIB))?;
        let kept = command == NBD_CMD_CACHE;
        ensure!(session.read(40 * MIB, 4096)? == [if kept { 0x5a } else { 0 }; 4096], "command {command}");
    }
    session.done(Request::new(NBD_CMD_CACHE, 0, 0, SIZE)).map(drop)
}

fn fast_zeroes_are_made_or_refused_at_once(target: &Target<'_>) -> Result<()> {
    let (mut session, export) = target.talk()?.go(target.export)?;
    let offered = export.flags & NBD_FLAG_SEND_FAST_ZERO != 0;
    session.write(0, &[3; 8192])?;
    let with_space = NBD_CMD_FLAG_FAST_ZERO | NBD_CMD_FLAG_NO_HOLE;
    let error = if offered { NBD_ENOTSUP } else { NBD_EINVAL };
    session.fails(Request::new(NBD_CMD_WRITE_ZEROES, with_space, 0, 512), error)?;
    ensure!(session.read(0, 512)? == [3; 512], "a refused request has written");
    let fast = Request::new(NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_FAST_ZERO, 512, 4096);
    if !offered {
        return session.fails(fast, NBD_EINVAL);
    }
    session.done(fast)?;
    let expected = [&[3; 512][..], &[0; 4096], &[3; 512]].concat();
    ensure!(session.read(0, 5120)? == expected, "fast zeroes are not just where they were asked for");
    Ok(())
}

fn a_cache_request_changes_nothing(target: &Target<'_>) -> Result<()> {
    let mut session = target.session()?;
    session.write(5 * MIB, &[4; 4096])?;
    session.done(Request::new(NBD_CMD_CACHE, 0, 5 * MIB + 1, 4095))?;
    ensure!(session.read(5 * MIB, 4096)? == [4; 4096], "after a cache request");
    Ok(())
}

/// Each command that has a range, with what it is refused by where the range is not of the export.
fn ranged(form: Form) -> [(u16, u16, u32); 4] {
    let payload = if form == Form::Extended { NBD_CMD_FLAG_PAYLOAD_LEN } else { 0 };
    [
        (NBD_CMD_TRIM, 0, NBD_EINVAL),
        (NBD_CMD_CACHE, 0, NBD_EINVAL),
        (NBD_CMD_WRITE_ZEROES, 0, NBD_ENOSPC),
        (NBD_CMD_WRITE, payload, NBD_ENOSPC),
    ]
}

fn past_the_end_is_refused(target: &Target<'_>) -> Result<()> {
    let mut session = target.session()?;
    session.write(SIZE - 4096, &[8; 4096])?;
    for (offset, len) in [(SIZE, 1), (SIZE - 1, 2), (SIZE - 4096, 8192), (SIZE + MIB, 4096), (1 << 62, 512)] {
        session.fails(read(offset, len), NBD_EINVAL)?;
        for (command, flags, error) in ranged(target.form) {
            let payload = vec![9; if command == NBD_CMD_WRITE { len as usize } else { 0 }];
            session.fails(Request { payload, ..Request::new(command, flags, offset, len) }, error)?;
        }
    }
    ensure!(session.read(SIZE - 4096, 4096)? == [8; 4096], "a refused request has written");
    if target.form.chunks() {
        let (mut session, _) = with_contexts(target)?;
        session.fails(Request::new(NBD_CMD_BLOCK_STATUS, 0, SIZE - 1, 2), NBD_EINVAL)?;
        session.done(Request::new(NBD_CMD_BLOCK_STATUS, 0, SIZE - 1, 1))?;
    }
    Ok(())
}

fn an_offset_and_length_that_overflow_are_refused(target: &Target<'_>) -> Result<()> {
    let mut session = target.session()?;
    for (offset, len) in [(u64::MAX, 1), (u64::MAX - 511, 512), (u64::MAX - 4095, 8192), (1 << 63, 4096)] {
        session.fails(read(offset, len), NBD_EINVAL)?;
        for (command, flags, error) in ranged(target.form) {
            let payload = vec![9; if command == NBD_CMD_WRITE { len as usize } else { 0 }];
            session.fails(Request { payload, ..Request::new(command, flags, offset, len) }, error)?;
        }
    }
    if target.form == Form::Extended {
        // Lengths of 64 bits overflow on their own.
        for len in [u64::MAX, u64::MAX - 4095, 1 << 63] {
            session.fails(read(4096, len), NBD_EINVAL)?;
            session.fails(Request::new(NBD_CMD_TRIM, 0, 4096, len), NBD_EINVAL)?;
            session.fails(Request::new(NBD_CMD_WRITE_ZEROES, 0, 4096, len), NBD_ENOSPC)?;
        }
    }
    session.read(0, 512).map(drop)
}

fn a_length_of_zero_is_refused(target: &Target<'_>) -> Result<()> {
    let mut session = target.session()?;
    session.fails(read(0, 0), NBD_EINVAL)?;
    for (command, flags, _) in ranged(target.form) {
        session.fails(Request::new(command, flags, 4096, 0), NBD_EINVAL)?;
        session.fails(Request::new(command, flags | NBD_CMD_FLAG_FUA, 0, 0), NBD_EINVAL)?;
    }
    if target.form.chunks() {
        let (mut session, _) = with_contexts(target)?;
        session.fails(Request::new(NBD_CMD_BLOCK_STATUS, 0, 0, 0), NBD_EINVAL)?;
    }
    session.read(0, 512).map(drop)
}

fn unknown_commands_are_refused(target: &Target<'_>) -> Result<()> {
    let mut session = target.session()?;
    for command in [NBD_CMD_RESIZE, 9, 255, 0x8000, u16::MAX] {
        session.fails(Request::new(command, 0, 0, 4096), NBD_EINVAL)?;
        session.fails(Request::new(command, NBD_CMD_FLAG_FUA, u64::MAX, 0), NBD_EINVAL)?;
    }
    session.read(0, 512).map(drop)
}

fn flags_of_other_commands_are_refused(target: &Target<'_>) -> Result<()> {
    let (mut session, export) = target.talk()?.go(target.export)?;
    let fast_zero = export.flags & NBD_FLAG_SEND_FAST_ZERO != 0;
    let data = pattern(5, 4096);
    session.write(0, &data)?;
    let unknown = [0x40, 0x80, 0x100, 0x8000];
    let known = [NBD_CMD_FLAG_NO_HOLE, NBD_CMD_FLAG_DF, NBD_CMD_FLAG_REQ_ONE, NBD_CMD_FLAG_FAST_ZERO];
    for flag in known.into_iter().chain(unknown) {
        let own = |command| match command {
            NBD_CMD_READ => flag == NBD_CMD_FLAG_DF && target.form.chunks(),
            NBD_CMD_WRITE_ZEROES if flag == NBD_CMD_FLAG_FAST_ZERO => fast_zero,
            NBD_CMD_WRITE_ZEROES => flag == NBD_CMD_FLAG_NO_HOLE,
            _ => false,
        };
        for command in [NBD_CMD_READ, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES, NBD_CMD_CACHE] {
            if !own(command) {
                session.fails(Request::new(command, flag, 0, 4096), NBD_EINVAL)?;
            }
        }
        session.fails(Request::write(target.form, 0, &[7; 4096]).flagged(flag), NBD_EINVAL)?;
        session.fails(Request::new(NBD_CMD_FLUSH, flag, 0, 0), NBD_EINVAL)?;
    }
    if target.form != Form::Extended {
        session.fails(Request::new(NBD_CMD_TRIM, NBD_CMD_FLAG_PAYLOAD_LEN, 0, 4096), NBD_EINVAL)?;
        let write = Request::write(target.form, 0, &[7; 4096]).flagged(NBD_CMD_FLAG_PAYLOAD_LEN);
        session.fails(write, NBD_EINVAL)?;
    }
    ensure!(session.read(0, 4096)? == data, "a refused request has written");
    Ok(())
}

fn block_status_without_a_context_is_refused(target: &Target<'_>) -> Result<()> {
    let mut session = target.session()?;
    session.fails(Request::new(NBD_CMD_BLOCK_STATUS, 0, 0, 4096), NBD_EINVAL)?;
    session.read(0, 512).map(drop)
}

fn a_wrong_magic_closes(target: &Target<'_>) -> Result<()> {
    let good = Request::new(NBD_CMD_FLUSH, 0, 0, 0);
    let other = if target.form == Form::Extended { Form::Simple } else { Form::Extended };
    let mut swapped = good.bytes(target.form);
    swapped[..4].reverse();
    for bytes in [vec![0; 32], swapped, [good.bytes(other), vec![0; 4]].concat()] {
        let mut session = target.session()?;
        // A server that skips what it does not know would answer what follows.
        session.wire.send(&[bytes, good.bytes(target.form)].concat())?;
        session.wire.expect_end()?;
    }
    Ok(())
}

fn cookies_are_any_number_and_may_be_used_again(target: &Target<'_>) -> Result<()> {
    let mut session = target.session()?;
    let data = pattern(6, 4096);
    session.write(0, &data)?;
    for cookie in [0, u64::MAX, 1 << 63, 0, 0] {
        session.send(&read(0, 4096).named(cookie))?;
        let reply = session.reply()?;
        ensure!(reply.cookie == cookie && reply.data == data, "cookie {cookie:#x}");
    }
    // The same cookie for all that is in flight: the server need not tell them apart, only send it back.
    let bytes: Vec<u8> = (0..32).flat_map(|_| session.note(&read(0, 4096).named(5))).collect();
    session.wire.send(&bytes)?;
    for _ in 0..32 {
        let reply = session.reply()?;
        ensure!(reply.cookie == 5 && reply.data == data, "one cookie for many: {:#x}", reply.cookie);
    }
    ensure!(session.disconnect()?.is_empty(), "more replies than requests");
    Ok(())
}

/// What a reply is to bring: the data of a read, and the error.
type Due = (Option<Vec<u8>>, u32);

/// Reads, writes and refused requests that do not touch each other, and what each is to bring.
fn mixed(form: Form, count: u64) -> Vec<(Request, Due)> {
    let request = |n: u64| match n % 6 {
        0 => (read(n * 4096, 4096), (Some(pattern(n, 4096)), 0)),
        1 => (Request::write(form, n * 4096, &pattern(n, 4096)), (None, 0)),
        2 => (Request::new(NBD_CMD_FLUSH, 0, 0, 0), (None, 0)),
        3 => (Request::new(NBD_CMD_WRITE_ZEROES, 0, n * 4096, 4096), (None, 0)),
        4 => (read(SIZE, 4096), (None, NBD_EINVAL)),
        _ => (Request::write(form, SIZE, &[1; 4096]), (None, NBD_ENOSPC)),
    };
    (0..count).map(request).collect()
}

/// Sends all of them at once, under cookies that count.
fn send_mixed(session: &mut Session, count: u64) -> Result<BTreeMap<u64, Due>> {
    for n in (0..count).step_by(6) {
        session.write(n * 4096, &pattern(n, 4096))?;
    }
    let (mut bytes, mut due) = (Vec::new(), BTreeMap::new());
    for (n, (request, expected)) in (0..).zip(mixed(session.form(), count)) {
        bytes.extend(session.note(&request.named(n)));
        due.insert(n, expected);
    }
    session.wire.send(&bytes)?;
    Ok(due)
}

/// Takes a reply off what is due.
fn tick(due: &mut BTreeMap<u64, Due>, reply: &Reply) -> Result<()> {
    let cookie = reply.cookie;
    let (data, error) = due.remove(&cookie).with_context(|| format!("a second reply to {cookie}"))?;
    ensure!(reply.error == error, "error {} instead of {error} for {cookie}", reply.error);
    ensure!(data.is_none_or(|data| data == reply.data), "data of {cookie}");
    Ok(())
}

fn many_requests_in_flight_are_each_answered_once(target: &Target<'_>) -> Result<()> {
    let mut session = target.session()?;
    let mut due = send_mixed(&mut session, 240)?;
    while !due.is_empty() {
        tick(&mut due, &session.reply()?)?;
    }
    ensure!(session.disconnect()?.is_empty(), "more replies than requests");
    Ok(())
}

fn a_goodbye_is_answered_by_all_that_is_in_flight(target: &Target<'_>) -> Result<()> {
    let mut session = target.session()?;
    let mut due = send_mixed(&mut session, 120)?;
    session.disconnect()?.iter().try_for_each(|reply| tick(&mut due, reply))?;
    ensure!(due.is_empty(), "without an answer: {:?}", due.keys());
    // Written is what was answered.
    let mut session = target.session()?;
    ensure!(session.read(4096, 4096)? == pattern(1, 4096), "a write before the end");
    Ok(())
}

fn a_request_byte_by_byte_is_understood(target: &Target<'_>) -> Result<()> {
    let mut session = target.session()?;
    let bytes = session.note(&Request::write(target.form, 7 * MIB, &pattern(4, 64)).named(1));
    for byte in bytes {
        session.wire.send(&[byte])?;
    }
    ensure!(session.reply()?.error == 0, "a write in small pieces");
    ensure!(session.read(7 * MIB, 64)? == pattern(4, 64), "a write in small pieces");
    Ok(())
}

fn a_write_that_does_not_arrive_whole_is_none(target: &Target<'_>) -> Result<()> {
    let mut session = target.session()?;
    session.write(9 * MIB, &[6; 8192])?;
    let bytes = Request::write(target.form, 9 * MIB, &[7; 8192]).bytes(target.form);
    session.wire.send(&bytes[..bytes.len() - 1])?;
    session.wire.finish()?;
    session.wire.expect_end()?;
    ensure!(target.session()?.read(9 * MIB, 8192)? == [6; 8192], "a part of a write was written");
    Ok(())
}

fn a_client_that_is_gone_leaves_the_others_alone(target: &Target<'_>) -> Result<()> {
    let mut stays = target.session()?;
    for _ in 0..8 {
        let mut goes = target.session()?;
        let bytes: Vec<u8> = (0..32).flat_map(|n| goes.note(&read(n * MIB, MIB).named(n))).collect();
        goes.wire.send(&bytes)?;
        drop(goes);
        stays.write(10 * MIB, &[5; 4096])?;
        ensure!(stays.read(10 * MIB, 4096)? == [5; 4096], "beside one that is gone");
    }
    Ok(())
}

fn dont_fragment_brings_one_piece(target: &Target<'_>) -> Result<()> {
    let mut session = target.session()?;
    session.done(Request::new(NBD_CMD_TRIM, 0, 20 * MIB, 4 * MIB))?;
    // Data among holes, so that there were reason for several.
    let mut model = vec![0; 4 * MIB as usize];
    for at in [0, MIB + 4096, 3 * MIB] {
        let data = pattern(at, 8192);
        session.write(20 * MIB + at, &data)?;
        model[at as usize..at as usize + 8192].copy_from_slice(&data);
    }
    for len in [65_536, 4 * MIB] {
        let reply = session.done(read(20 * MIB, len).flagged(NBD_CMD_FLAG_DF))?;
        ensure!(reply.pieces == 1, "{} pieces of {len} bytes", reply.pieces);
        ensure!(reply.data == model[..len as usize], "{len} bytes");
    }
    Ok(())
}

/// States of one context, a byte range each, from a status that is asked for until the range is described.
fn described(session: &mut Session, context: u32, offset: u64, len: u64) -> Result<Vec<(u64, u64, u64)>> {
    let (mut at, mut all) = (offset, Vec::new());
    while at < offset + len {
        let reply = session.done(Request::new(NBD_CMD_BLOCK_STATUS, 0, at, offset + len - at))?;
        ensure!(reply.status.len() == 2, "{} contexts answered", reply.status.len());
        let list = reply.status.into_iter().find(|(number, _)| *number == context);
        for (len, state) in list.context("a chosen context is not answered")?.1 {
            all.push((at, len, state));
            at += len;
        }
    }
    Ok(all)
}

fn block_status_describes_the_range(target: &Target<'_>) -> Result<()> {
    let (mut session, allocation) = with_contexts(target)?;
    session.done(Request::new(NBD_CMD_TRIM, 0, 28 * MIB, 4 * MIB))?;
    session.write(29 * MIB, &pattern(1, MIB))?;
    let described = described(&mut session, allocation, 28 * MIB + 1, 4 * MIB - 1)?;
    for (at, len, state) in described {
        ensure!(state & !(NBD_STATE_HOLE | NBD_STATE_ZERO) == 0, "state {state:#x}");
        let data = at < 30 * MIB && at + len > 29 * MIB;
        ensure!(!data || state & NBD_STATE_ZERO == 0, "data said to be zeroes: {len} bytes at {at}");
    }
    if target.degraded {
        let reply = session.done(Request::new(NBD_CMD_BLOCK_STATUS, 0, SIZE - 512, 512))?;
        ensure!(reply.status.len() == 2, "both contexts, also of what a replica lacks: {reply:?}");
    }
    Ok(())
}

fn one_descriptor_is_brought_where_one_is_asked_for(target: &Target<'_>) -> Result<()> {
    let (mut session, _) = with_contexts(target)?;
    session.write(33 * MIB, &pattern(1, 4096))?;
    session.done(Request::new(NBD_CMD_TRIM, 0, 33 * MIB + 8192, 65_536))?;
    for (offset, len) in [(33 * MIB, MIB), (33 * MIB + 100, 1), (0, SIZE)] {
        let reply = session.done(Request::new(NBD_CMD_BLOCK_STATUS, NBD_CMD_FLAG_REQ_ONE, offset, len))?;
        let counts: Vec<usize> = reply.status.iter().map(|(_, list)| list.len()).collect();
        ensure!(counts == [1, 1], "{counts:?} descriptors");
    }
    Ok(())
}

fn holes_read_as_zeroes(target: &Target<'_>) -> Result<()> {
    let (mut session, allocation) = with_contexts(target)?;
    session.done(Request::new(NBD_CMD_TRIM, 0, 36 * MIB, MIB))?;
    session.write(36 * MIB + 512 * KIB, &pattern(3, 4096))?;
    for (at, len, state) in described(&mut session, allocation, 36 * MIB, MIB)? {
        if state & NBD_STATE_ZERO != 0 {
            ensure!(session.read(at, len)?.iter().all(|byte| *byte == 0), "{len} bytes at {at} are not zero");
        }
    }
    Ok(())
}

fn a_write_needs_the_flag_of_its_payload(target: &Target<'_>) -> Result<()> {
    let mut session = target.session()?;
    session.write(0, &[2; 4096])?;
    // Nothing follows such a header, so the next request must be understood.
    session.fails(Request::new(NBD_CMD_WRITE, 0, 0, 4096), NBD_EINVAL)?;
    ensure!(session.read(0, 4096)? == [2; 4096], "a write without payload has written");
    Ok(())
}

fn payloads_that_do_not_belong_are_refused_and_thrown_away(target: &Target<'_>) -> Result<()> {
    let mut session = target.session()?;
    session.write(0, &[2; 4096])?;
    // Bytes that look like a request must not be taken for one.
    let bait = Request::new(NBD_CMD_TRIM, 0, 0, 4096).bytes(Form::Extended).repeat(3000);
    for command in [NBD_CMD_READ, NBD_CMD_TRIM, NBD_CMD_FLUSH, NBD_CMD_CACHE, NBD_CMD_WRITE_ZEROES, 77] {
        for len in [32, bait.len()] {
            let request = Request::new(command, NBD_CMD_FLAG_PAYLOAD_LEN, 0, len as u64);
            session.fails(Request { payload: bait[..len].to_vec(), ..request }, NBD_EINVAL)?;
        }
    }
    let (mut other, _) = with_contexts(target)?;
    let request = Request::new(NBD_CMD_BLOCK_STATUS, NBD_CMD_FLAG_PAYLOAD_LEN, 0, 12);
    other.fails(Request { payload: vec![0; 12], ..request }, NBD_EINVAL)?;
    ensure!(session.read(0, 4096)? == [2; 4096], "a payload was taken for a request");
    Ok(())
}

fn a_payload_of_4_gib_closes(target: &Target<'_>) -> Result<()> {
    for len in [1 << 32, u64::MAX] {
        let mut session = target.session()?;
        let request = Request::new(NBD_CMD_WRITE, NBD_CMD_FLAG_PAYLOAD_LEN, 0, len);
        session.wire.send(&request.bytes(Form::Extended))?;
        session.wire.expect_end()?;
    }
    Ok(())
}
