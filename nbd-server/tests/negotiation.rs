//! The negotiation, option by option, as a pure state machine.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use blkrepl_engine::reactor::ClientSession;
use blkrepl_nbd::negotiate::{
    CloseReason, Negotiation, OPTION_BYTES_MAX, OPTION_DRAIN_MAX, OPTIONS_MAX, Progress, Terms, Want,
};
use blkrepl_nbd::proto::*;
use blkrepl_nbd::{
    Admitting, Contexts, ExportInfo, ExportRefusal, Exports, MetaContext, Peer, Place, Replies,
};
use proptest::prelude::*;

const SIZE: u64 = 1 << 30;
const LINEAGE: u128 = 0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10;

/// `vol0` is served; `away` has its primary elsewhere; `late` is on a node that stops.
struct Fixed(&'static [&'static str]);

const ALL: Fixed = Fixed(&["vol0", "away", "late"]);
const POLICY_TEXT: &str = "volume away: n2 is primary, at nbd://10.0.0.2:10809/away";

impl Exports for Fixed {
    fn list(&self) -> Vec<String> {
        self.0.iter().map(ToString::to_string).collect()
    }

    fn open(&self, name: &str) -> Result<ExportInfo, ExportRefusal> {
        match name {
            _ if !self.0.contains(&name) => Err(ExportRefusal::Unknown(format!("no volume {name:?}"))),
            "away" => Err(ExportRefusal::Policy(POLICY_TEXT.into())),
            "late" => Err(ExportRefusal::Shutdown),
            _ => Ok(ExportInfo { lineage: Some(LINEAGE), ..ExportInfo::new(name, SIZE) }),
        }
    }

    fn places(&self, name: &str) -> Result<Vec<Place>, ExportRefusal> {
        let place = |address: &str, primary| Place { address: address.into(), primary };
        let too_long = "h".repeat(STRING_BYTES_MAX + 1);
        match name {
            "away" => Ok(vec![place("n1:1", false), place(&too_long, false), place("n2:2", true)]),
            _ => Err(ExportRefusal::Unknown(format!("no volume {name:?}"))),
        }
    }

    fn admit(&self, _: &str, _: Peer) -> Admitting {
        panic!("a negotiation admits nobody");
    }
}

/// What is said of `vol0`.
fn vol0() -> ExportInfo {
    ExportInfo { lineage: Some(LINEAGE), ..ExportInfo::new("vol0", SIZE) }
}

/// What came of feeding bytes to a negotiation.
struct Outcome {
    /// All that was sent after the greeting.
    sent: Vec<u8>,
    progress: Progress,
    /// Bytes that were not read.
    left: usize,
}

/// Feeds exactly what is wanted until the input is used up or the negotiation ends; admits everybody.
fn feed(input: &[u8], exports: &dyn Exports) -> Outcome {
    feed_with(input, exports, Ok(()))
}

/// The same, with this answer to every wish for an admission.
fn feed_with(mut input: &[u8], exports: &dyn Exports, admitted: Result<(), ExportRefusal>) -> Outcome {
    let mut out = Vec::new();
    let mut machine = Negotiation::new(&mut out);
    assert_eq!(out.len(), GREETING_LEN);
    out.clear();
    let mut progress = Progress::Continue;
    while progress == Progress::Continue {
        let (discard, len) = match machine.wants() {
            Want::Bytes(len) => {
                assert!(len <= OPTION_BYTES_MAX as usize, "no option makes the server hold {len} bytes");
                (false, len)
            }
            Want::Discard(len) => {
                assert!(len <= OPTION_DRAIN_MAX);
                (true, len as usize)
            }
        };
        let Some((bytes, rest)) = input.split_at_checked(len) else { break };
        input = rest;
        let before = out.len();
        progress = machine.advance(if discard { &[] } else { bytes }, exports, &mut out);
        if let Progress::Admit(info) = &progress {
            assert_eq!((info.size, out.len()), (SIZE, before), "nothing is said before the admission");
            progress = machine.admitted(admitted.clone(), &mut out);
        }
    }
    Outcome { sent: out, progress, left: input.len() }
}

/// The transmission phase, with no metadata context.
fn entered(export: ExportInfo, replies: Replies) -> Progress {
    Progress::Transmission(Terms { export, replies, contexts: Contexts::NONE, session: None })
}

fn client_flags(flags: u32) -> Vec<u8> {
    flags.to_be_bytes().to_vec()
}

fn fixed() -> Vec<u8> {
    client_flags(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES)
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    [&IHAVEOPT.to_be_bytes()[..], &option.to_be_bytes(), &len.to_be_bytes(), data].concat()
}

fn info(kind: u32, name: &str, wanted: &[u16]) -> Vec<u8> {
    option(kind, &info_data(name.as_bytes(), wanted))
}

fn info_data(name: &[u8], wanted: &[u16]) -> Vec<u8> {
    let mut data = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
    data.extend_from_slice(name);
    data.extend_from_slice(&u16::try_from(wanted.len()).unwrap().to_be_bytes());
    data.extend(wanted.iter().flat_map(|info| info.to_be_bytes()));
    data
}

/// Takes the replies apart: (option, reply, data).
fn replies(mut sent: &[u8]) -> Vec<(u32, u32, Vec<u8>)> {
    let word = |at: usize, sent: &[u8]| u32::from_be_bytes(sent[at..at + 4].try_into().unwrap());
    let mut found = Vec::new();
    while !sent.is_empty() {
        assert_eq!(sent[..8], NBD_REP_MAGIC.to_be_bytes());
        let len = word(16, sent) as usize;
        found.push((word(8, sent), word(12, sent), sent[20..20 + len].to_vec()));
        sent = &sent[20 + len..];
    }
    found
}

/// The replies to one option in a fixed newstyle session, and that the session goes on after it.
fn replies_to(bytes: &[u8], exports: &dyn Exports) -> Vec<(u32, u32, Vec<u8>)> {
    let outcome = feed(&[&fixed(), bytes].concat(), exports);
    assert_eq!(outcome.progress, Progress::Continue);
    let again = feed(&[&fixed(), bytes, &info(NBD_OPT_GO, "vol0", &[])].concat(), exports);
    assert!(matches!(again.progress, Progress::Transmission(_)), "the session goes on");
    assert_eq!(again.left, 0);
    replies(&outcome.sent)
}

fn assert_refused(bytes: &[u8], option: u32, reply: u32, text: &str) {
    let replies = replies_to(bytes, &ALL);
    assert_eq!(replies.len(), 1);
    assert_eq!((replies[0].0, replies[0].1), (option, reply));
    let said = std::str::from_utf8(&replies[0].2).unwrap();
    assert!(said.contains(text), "{said}");
}

fn export_reply() -> Vec<u8> {
    let flags = vol0().transmission_flags(Replies::Simple);
    [&NBD_INFO_EXPORT.to_be_bytes()[..], &SIZE.to_be_bytes(), &flags.to_be_bytes()].concat()
}

#[test]
fn the_greeting_is_fixed_newstyle_without_zeroes() {
    let mut out = Vec::new();
    let machine = Negotiation::new(&mut out);
    assert_eq!(out, b"NBDMAGICIHAVEOPT\x00\x03");
    assert_eq!(machine.wants(), Want::Bytes(4));
}

#[test]
fn the_transmission_flags_are_those_that_are_kept() {
    let flags = vol0().transmission_flags(Replies::Simple);
    assert_eq!(flags, 0b101_0110_1101, "HAS_FLAGS FLUSH FUA TRIM WRITE_ZEROES CAN_MULTI_CONN CACHE");
    for replies in [Replies::Structured, Replies::Extended] {
        let flags = vol0().transmission_flags(replies);
        assert_eq!(flags, 0b101_1110_1101, "and DF");
    }
    let fast = ExportInfo { fast_zero: true, ..vol0() };
    assert_eq!(fast.transmission_flags(Replies::Simple) ^ flags, NBD_FLAG_SEND_FAST_ZERO);
    let turning = ExportInfo { rotational: true, ..vol0() };
    assert_eq!(turning.transmission_flags(Replies::Simple) ^ flags, NBD_FLAG_ROTATIONAL);
}

#[test]
fn structured_replies_are_agreed_to_and_df_is_announced_only_then() {
    let structured = structured();
    assert_eq!(replies_to(&structured, &ALL), [(NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK, Vec::new())]);
    for last in [option(NBD_OPT_EXPORT_NAME, b"vol0"), info(NBD_OPT_GO, "vol0", &[])] {
        let outcome = feed(&[fixed(), structured.clone(), last].concat(), &ALL);
        let export = vol0();
        let flags = export.transmission_flags(Replies::Structured).to_be_bytes();
        let announced = [&SIZE.to_be_bytes()[..], &flags].concat();
        assert!(outcome.sent.windows(10).any(|bytes| bytes == announced), "{:x?}", outcome.sent);
        assert_eq!(outcome.progress, entered(export, Replies::Structured));
    }
}

#[test]
fn structured_replies_are_not_agreed_to_with_data() {
    let bad = option(NBD_OPT_STRUCTURED_REPLY, b"1");
    assert_refused(&bad, NBD_OPT_STRUCTURED_REPLY, NBD_REP_ERR_INVALID, "no data");
    let outcome = feed(&[fixed(), bad, info(NBD_OPT_GO, "vol0", &[])].concat(), &ALL);
    assert_eq!(outcome.progress, entered(vol0(), Replies::Simple));
}

fn extended() -> Vec<u8> {
    option(NBD_OPT_EXTENDED_HEADERS, b"")
}

/// The replies that a session with these options ends in.
fn agreed(options: &[Vec<u8>]) -> Replies {
    let outcome = feed(&[fixed(), options.concat(), info(NBD_OPT_GO, "vol0", &[])].concat(), &ALL);
    let Progress::Transmission(Terms { replies, .. }) = outcome.progress else {
        panic!("{:?}", outcome.progress)
    };
    replies
}

#[test]
fn extended_headers_are_agreed_to_with_and_without_structured_replies_before() {
    assert_eq!(replies_to(&extended(), &ALL), [(NBD_OPT_EXTENDED_HEADERS, NBD_REP_ACK, Vec::new())]);
    assert_eq!(agreed(&[extended()]), Replies::Extended);
    assert_eq!(agreed(&[option(NBD_OPT_STRUCTURED_REPLY, b""), extended()]), Replies::Extended);
    assert_eq!(agreed(&[extended(), extended()]), Replies::Extended);
    let outcome = feed(&[fixed(), extended(), info(NBD_OPT_GO, "vol0", &[])].concat(), &ALL);
    let flags = vol0().transmission_flags(Replies::Extended).to_be_bytes();
    assert!(replies(&outcome.sent)[1].2.ends_with(&flags), "DF is announced");
}

#[test]
fn structured_replies_after_extended_headers_are_refused_and_change_nothing() {
    let structured = structured();
    let said = replies_to(&[extended(), structured.clone()].concat(), &ALL);
    assert_eq!((said[1].0, said[1].1), (NBD_OPT_STRUCTURED_REPLY, NBD_REP_ERR_EXT_HEADER_REQD));
    assert_eq!(agreed(&[extended(), structured]), Replies::Extended);
}

#[test]
fn extended_headers_are_not_agreed_to_with_data() {
    let bad = option(NBD_OPT_EXTENDED_HEADERS, b"1");
    assert_refused(&bad, NBD_OPT_EXTENDED_HEADERS, NBD_REP_ERR_INVALID, "no data");
    assert_eq!(agreed(&[bad]), Replies::Simple);
}

#[test]
fn export_name_after_extended_headers_closes() {
    let outcome = feed(&[fixed(), extended(), option(NBD_OPT_EXPORT_NAME, b"vol0")].concat(), &ALL);
    assert_eq!(outcome.progress, Progress::Close(CloseReason::ExportNameExtended));
}

fn structured() -> Vec<u8> {
    option(NBD_OPT_STRUCTURED_REPLY, b"")
}

fn contexts_data(name: &[u8], queries: &[&str]) -> Vec<u8> {
    let string = |text: &[u8]| [&u32::try_from(text.len()).unwrap().to_be_bytes()[..], text].concat();
    let queries: Vec<Vec<u8>> = queries.iter().map(|query| string(query.as_bytes())).collect();
    let count = u32::try_from(queries.len()).unwrap();
    [string(name), count.to_be_bytes().to_vec(), queries.concat()].concat()
}

fn list_contexts(queries: &[&str]) -> Vec<u8> {
    option(NBD_OPT_LIST_META_CONTEXT, &contexts_data(b"vol0", queries))
}

fn set_contexts(name: &str, queries: &[&str]) -> Vec<u8> {
    option(NBD_OPT_SET_META_CONTEXT, &contexts_data(name.as_bytes(), queries))
}

const BOTH: [&str; 2] = ["base:allocation", "blkrepl:dirty"];

/// The names and numbers of the contexts that the last option is answered, all of whose replies are as they should
/// be.
fn contexts_of(options: &[Vec<u8>]) -> Vec<(u32, String)> {
    let before = feed(&[fixed(), options[..options.len() - 1].concat()].concat(), &ALL).sent.len();
    let sent = feed(&[fixed(), options.concat()].concat(), &ALL).sent;
    let mut said = replies(&sent[before..]);
    let (option, last, nothing) = said.pop().unwrap();
    assert_eq!((last, nothing), (NBD_REP_ACK, Vec::new()));
    let context = |(of, reply, data): (u32, u32, Vec<u8>)| {
        assert_eq!((of, reply), (option, NBD_REP_META_CONTEXT));
        let (id, name) = data.split_first_chunk().unwrap();
        (u32::from_be_bytes(*id), String::from_utf8(name.to_vec()).unwrap())
    };
    said.into_iter().map(context).collect()
}

/// The names of the contexts that a session with these options ends in, with `NBD_OPT_GO` to `name`.
fn chosen(options: &[Vec<u8>], name: &str, exports: &dyn Exports) -> Vec<&'static str> {
    let outcome = feed(&[fixed(), options.concat(), info(NBD_OPT_GO, name, &[])].concat(), exports);
    let Progress::Transmission(Terms { contexts, .. }) = outcome.progress else {
        panic!("{:?}", outcome.progress)
    };
    contexts.iter().map(MetaContext::name).collect()
}

#[test]
fn listing_contexts_without_a_query_lists_all_with_number_0() {
    for form in [structured(), extended()] {
        let all = contexts_of(&[form, list_contexts(&[])]);
        assert_eq!(all, BOTH.map(|name| (0, name.to_owned())));
    }
}

#[test]
fn listing_contexts_takes_a_namespace_as_wildcard() {
    let list = |queries: &[&str]| -> Vec<String> {
        contexts_of(&[structured(), list_contexts(queries)]).into_iter().map(|(_, name)| name).collect()
    };
    assert_eq!(list(&["base:"]), BOTH[..1]);
    assert_eq!(list(&["blkrepl:"]), BOTH[1..]);
    assert_eq!(list(&["blkrepl:", "base:", "base:allocation"]), BOTH);
    assert_eq!(list(&["blkrepl:dirty"]), BOTH[1..]);
}

#[test]
fn queries_of_unknown_namespaces_and_leaf_names_are_passed_over() {
    let strange =
        ["qemu:dirty-bitmap:x", "x-none:", "base:none", "blkrepl:none", "base", "", ":", "BASE:allocation"];
    assert_eq!(contexts_of(&[structured(), list_contexts(&strange)]), []);
    assert_eq!(contexts_of(&[structured(), set_contexts("vol0", &strange)]), []);
    let mixed = [&strange[..], &BOTH[1..]].concat();
    assert_eq!(contexts_of(&[structured(), list_contexts(&mixed)]), [(0, BOTH[1].to_owned())]);
    assert_eq!(chosen(&[structured(), set_contexts("vol0", &mixed)], "vol0", &ALL), BOTH[1..]);
}

#[test]
fn setting_contexts_answers_each_once_with_a_number_of_its_own() {
    let twice = [BOTH[1], BOTH[0], BOTH[1]];
    let set = contexts_of(&[structured(), set_contexts("vol0", &twice)]);
    assert_eq!(set, [(1, BOTH[0].to_owned()), (2, BOTH[1].to_owned())]);
    assert_eq!(chosen(&[extended(), set_contexts("vol0", &BOTH)], "vol0", &ALL), BOTH);
}

#[test]
fn setting_contexts_selects_none_by_wildcards_or_without_queries() {
    for queries in [&["base:", "blkrepl:"][..], &[]] {
        assert_eq!(contexts_of(&[structured(), set_contexts("vol0", queries)]), []);
        assert!(chosen(&[structured(), set_contexts("vol0", queries)], "vol0", &ALL).is_empty());
    }
}

#[test]
fn contexts_need_structured_replies_or_extended_headers_first() {
    for set in [set_contexts("vol0", &BOTH), list_contexts(&[])] {
        let kind = u32::from(set[11]);
        assert_refused(&set, kind, NBD_REP_ERR_INVALID, "come first");
    }
    assert!(chosen(&[set_contexts("vol0", &BOTH), structured()], "vol0", &ALL).is_empty());
}

#[test]
fn setting_contexts_replaces_those_before() {
    let first = set_contexts("vol0", &BOTH);
    let second = set_contexts("vol0", &BOTH[..1]);
    assert_eq!(chosen(&[structured(), first.clone(), second], "vol0", &ALL), BOTH[..1]);
    let listed = list_contexts(&[]);
    assert_eq!(chosen(&[structured(), first.clone(), listed], "vol0", &ALL), BOTH, "a list changes nothing");
    assert_eq!(chosen(&[structured(), first.clone(), extended()], "vol0", &ALL), BOTH);
    // So does one that fails, whatever of it is wrong.
    let failing = [
        set_contexts("none", &BOTH),
        set_contexts("away", &BOTH),
        set_contexts("late", &BOTH),
        option(NBD_OPT_SET_META_CONTEXT, b"x"),
        option(NBD_OPT_SET_META_CONTEXT, b""),
        option(NBD_OPT_SET_META_CONTEXT, &[0; OPTION_BYTES_MAX as usize + 1]),
    ];
    for failing in failing {
        assert!(chosen(&[structured(), first.clone(), failing], "vol0", &ALL).is_empty());
    }
}

#[test]
fn contexts_hold_for_the_export_that_they_were_set_for() {
    let two = Fixed(&["vol0", "vol1"]);
    let set = [structured(), set_contexts("vol0", &BOTH)];
    assert_eq!(chosen(&set, "vol0", &two), BOTH);
    assert!(chosen(&set, "vol1", &two).is_empty());
    let between = info(NBD_OPT_INFO, "vol1", &[]);
    assert_eq!(chosen(&[set.concat(), between], "vol0", &two), BOTH, "a look at another is no choice");
    for (name, expected) in [(&b"vol0"[..], &BOTH[..]), (b"vol1", &[])] {
        let outcome = feed(&[fixed(), set.concat(), option(NBD_OPT_EXPORT_NAME, name)].concat(), &two);
        let Progress::Transmission(Terms { contexts, .. }) = outcome.progress else {
            panic!("{:?}", outcome.progress)
        };
        assert_eq!(contexts.iter().map(MetaContext::name).collect::<Vec<_>>(), expected);
    }
    // The only volume is the one that the empty name means.
    let set = [structured(), set_contexts("", &BOTH)];
    assert_eq!(chosen(&set, "", &Fixed(&["vol0"])), BOTH);
    assert_eq!(chosen(&set, "vol0", &Fixed(&["vol0"])), BOTH);
}

#[test]
fn contexts_of_exports_that_are_not_served_are_refused_with_the_reason() {
    for kind in [NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT] {
        let cases = [
            ("away", NBD_REP_ERR_POLICY),
            ("none", NBD_REP_ERR_UNKNOWN),
            ("late", NBD_REP_ERR_SHUTDOWN),
            ("", NBD_REP_ERR_UNKNOWN),
        ];
        for (name, reply) in cases {
            let asked = option(kind, &contexts_data(name.as_bytes(), &BOTH));
            let said = replies_to(&[structured(), asked].concat(), &ALL);
            assert_eq!((said.len(), said[1].0, said[1].1), (2, kind, reply), "{name}");
        }
    }
}

#[test]
fn malformed_context_requests_are_invalid() {
    let good = contexts_data(b"vol0", &BOTH);
    let mut cases: Vec<Vec<u8>> = (0..good.len()).map(|len| good[..len].to_vec()).collect();
    cases.push([&good[..], &[0]].concat());
    cases.push(contexts_data(b"\xff", &[]));
    cases.push(contexts_data(b"vol0", &["base:\0"]));
    cases.push(contexts_data(b"vol0", &[&format!("x-a:{}", "b".repeat(STRING_BYTES_MAX))]));
    cases.push([&contexts_data(b"vol0", &[])[..8], &u32::MAX.to_be_bytes()].concat());
    for data in cases {
        for kind in [NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT] {
            let said = replies_to(&[structured(), option(kind, &data)].concat(), &ALL);
            assert_eq!((said.len(), said[1].0, said[1].1), (2, kind, NBD_REP_ERR_INVALID), "{data:x?}");
        }
    }
}

#[test]
fn the_longest_queries_pass() {
    let long = format!("x-a:{}", "b".repeat(STRING_BYTES_MAX - 4));
    let name = "x".repeat(STRING_BYTES_MAX);
    let said = replies_to(&[structured(), set_contexts(&name, &[&long, &long])].concat(), &ALL);
    assert_eq!(said[1].1, NBD_REP_ERR_UNKNOWN, "it was read whole");
}

#[test]
fn client_flags_that_were_not_offered_close() {
    for flags in [1 << 2, 1 << 31, u32::MAX] {
        let outcome = feed(&client_flags(flags), &ALL);
        assert_eq!(outcome.progress, Progress::Close(CloseReason::UnknownFlags(flags)));
        assert!(outcome.sent.is_empty());
    }
}

#[test]
fn export_name_answers_with_and_without_zeroes() {
    for (flags, zeroes) in [(0, 124), (NBD_FLAG_C_FIXED_NEWSTYLE, 124), (NBD_FLAG_C_NO_ZEROES, 0), (3, 0)] {
        let outcome = feed(&[client_flags(flags), option(NBD_OPT_EXPORT_NAME, b"vol0")].concat(), &ALL);
        assert_eq!(outcome.progress, entered(vol0(), Replies::Simple));
        let mut expected = export_reply()[2..].to_vec();
        expected.resize(expected.len() + zeroes, 0);
        assert_eq!(outcome.sent, expected);
    }
}

#[test]
fn export_name_can_only_be_refused_by_closing() {
    let long = vec![b'x'; STRING_BYTES_MAX + 1];
    let too_long = vec![b'x'; OPTION_BYTES_MAX as usize + 1];
    for name in [&b"none"[..], b"away", b"late", b"", b"\xff", b"vol0\0", &long, &too_long] {
        let outcome = feed(&[fixed(), option(NBD_OPT_EXPORT_NAME, name)].concat(), &ALL);
        assert!(matches!(outcome.progress, Progress::Close(_)));
        assert!(outcome.sent.is_empty(), "{name:?}");
    }
}

#[test]
fn go_enters_transmission_and_reads_nothing_behind_it() {
    let request = RequestHeader { flags: 0, command: NBD_CMD_FLUSH, handle: 1, offset: 0, len: 0 }.encode();
    let input = [&fixed()[..], &info(NBD_OPT_GO, "vol0", &[]), &request].concat();
    let outcome = feed(&input, &ALL);
    assert_eq!(outcome.progress, entered(vol0(), Replies::Simple));
    assert_eq!(outcome.left, REQUEST_LEN);
    let expected = [(NBD_OPT_GO, NBD_REP_INFO, export_reply()), (NBD_OPT_GO, NBD_REP_ACK, Vec::new())];
    assert_eq!(replies(&outcome.sent), expected);
}

#[test]
fn info_gives_what_is_asked_for_and_ignores_what_it_does_not_know() {
    let wanted =
        [NBD_INFO_BLOCK_SIZE, 77, NBD_INFO_NAME, NBD_INFO_DESCRIPTION, NBD_INFO_EXPORT, NBD_INFO_NAME];
    let replies = replies_to(&info(NBD_OPT_INFO, "vol0", &wanted), &ALL);
    let mut block_size = NBD_INFO_BLOCK_SIZE.to_be_bytes().to_vec();
    for size in [1u32, 4096, 32 << 20] {
        block_size.extend_from_slice(&size.to_be_bytes());
    }
    let text = vol0().description();
    let expected = [
        (NBD_OPT_INFO, NBD_REP_INFO, export_reply()),
        (NBD_OPT_INFO, NBD_REP_INFO, [&NBD_INFO_NAME.to_be_bytes(), &b"vol0"[..]].concat()),
        (NBD_OPT_INFO, NBD_REP_INFO, [&NBD_INFO_DESCRIPTION.to_be_bytes(), text.as_bytes()].concat()),
        (NBD_OPT_INFO, NBD_REP_INFO, block_size),
        (NBD_OPT_INFO, NBD_REP_ACK, Vec::new()),
    ];
    assert_eq!(replies, expected);
}

#[test]
fn go_right_after_info_says_the_same() {
    let wanted = [NBD_INFO_NAME, NBD_INFO_DESCRIPTION, NBD_INFO_BLOCK_SIZE];
    for form in [Vec::new(), structured(), extended()] {
        let said = |kind| {
            let sent = feed(&[&fixed(), &form[..], &info(kind, "vol0", &wanted)].concat(), &ALL).sent;
            let said = replies(&sent).into_iter().filter(|(of, _, _)| *of == kind);
            said.map(|(_, reply, data)| (reply, data)).collect::<Vec<_>>()
        };
        assert_eq!(said(NBD_OPT_INFO), said(NBD_OPT_GO));
        assert_eq!(said(NBD_OPT_INFO).len(), 5);
    }
}

#[test]
fn block_sizes_are_as_the_specification_wants_them() {
    let ExportInfo { min_block, preferred_block, max_payload, .. } = vol0();
    assert!(min_block.is_power_of_two() && min_block <= 65536 && SIZE.is_multiple_of(min_block.into()));
    assert!(preferred_block.is_power_of_two() && preferred_block >= min_block.max(512));
    assert!(max_payload.is_multiple_of(min_block) && max_payload >= preferred_block.max(1 << 20));
}

#[test]
fn exports_that_are_not_served_are_refused_with_the_reason() {
    for kind in [NBD_OPT_INFO, NBD_OPT_GO] {
        assert_refused(&info(kind, "away", &[]), kind, NBD_REP_ERR_POLICY, POLICY_TEXT);
        assert_refused(&info(kind, "none", &[]), kind, NBD_REP_ERR_UNKNOWN, "\"none\"");
        assert_refused(&info(kind, "late", &[]), kind, NBD_REP_ERR_SHUTDOWN, "stopping");
    }
}

#[test]
fn the_empty_name_means_the_only_volume() {
    for kind in [NBD_OPT_INFO, NBD_OPT_GO] {
        let one = feed(&[fixed(), info(kind, "", &[NBD_INFO_NAME])].concat(), &Fixed(&["vol0"]));
        let replies = replies(&one.sent);
        assert_eq!(replies.last().unwrap().1, NBD_REP_ACK);
        assert_eq!(replies[1].2, b"\x00\x01vol0");
        assert_refused(&info(kind, "", &[]), kind, NBD_REP_ERR_UNKNOWN, "3 volumes");
        let none = feed(&[fixed(), info(kind, "", &[])].concat(), &Fixed(&[]));
        assert_eq!(none.progress, Progress::Continue);
    }
    let outcome = feed(&[fixed(), option(NBD_OPT_EXPORT_NAME, b"")].concat(), &Fixed(&["vol0"]));
    assert_eq!(outcome.progress, entered(vol0(), Replies::Simple));
    let outcome = feed(&[fixed(), option(NBD_OPT_EXPORT_NAME, b"")].concat(), &ALL);
    assert!(matches!(outcome.progress, Progress::Close(CloseReason::ExportNameRefused { .. })));
}

#[test]
fn malformed_info_requests_are_invalid() {
    let good = info_data(b"vol0", &[NBD_INFO_NAME]);
    let mut cases: Vec<Vec<u8>> = (0..good.len()).map(|len| good[..len].to_vec()).collect();
    cases.push([&good[..], &[0]].concat());
    cases.push([&good[..], &[0, 1]].concat());
    cases.push(info_data(b"\xff\xfe", &[]));
    cases.push(info_data(b"vol0\0", &[]));
    cases.push(info_data(&vec![b'x'; STRING_BYTES_MAX + 1], &[]));
    cases.push([&u32::MAX.to_be_bytes()[..], b"vol0", &[0, 0]].concat());
    for data in cases {
        for kind in [NBD_OPT_INFO, NBD_OPT_GO] {
            assert_refused(&option(kind, &data), kind, NBD_REP_ERR_INVALID, "");
        }
    }
}

#[test]
fn the_longest_name_passes() {
    let name = "x".repeat(STRING_BYTES_MAX);
    let bytes = info(NBD_OPT_INFO, &name, &[0; 100]);
    assert_refused(&bytes, NBD_OPT_INFO, NBD_REP_ERR_UNKNOWN, "xxx");
}

#[test]
fn list_names_all_volumes_and_takes_no_data() {
    let replies = replies_to(&option(NBD_OPT_LIST, &[]), &ALL);
    let expected = [
        (NBD_OPT_LIST, NBD_REP_SERVER, b"\0\0\0\x04vol0".to_vec()),
        (NBD_OPT_LIST, NBD_REP_SERVER, b"\0\0\0\x04away".to_vec()),
        (NBD_OPT_LIST, NBD_REP_SERVER, b"\0\0\0\x04late".to_vec()),
        (NBD_OPT_LIST, NBD_REP_ACK, Vec::new()),
    ];
    assert_eq!(replies, expected);
    assert_refused(&option(NBD_OPT_LIST, b"x"), NBD_OPT_LIST, NBD_REP_ERR_INVALID, "no data");
}

#[test]
fn abort_is_acknowledged_with_and_without_data() {
    for data in [&b""[..], b"ignored"] {
        let outcome = feed(&[fixed(), option(NBD_OPT_ABORT, data)].concat(), &ALL);
        assert_eq!(outcome.progress, Progress::Close(CloseReason::Aborted));
        assert_eq!(replies(&outcome.sent), [(NBD_OPT_ABORT, NBD_REP_ACK, Vec::new())]);
    }
}

#[test]
fn other_options_are_unsupported_and_the_session_goes_on() {
    let options = [0, 4, NBD_OPT_STARTTLS, 12, 0x7fff_ffff, u32::MAX];
    for kind in options {
        for len in [0, 1, 100, 70_000, OPTION_DRAIN_MAX as usize] {
            assert_refused(&option(kind, &vec![7; len]), kind, NBD_REP_ERR_UNSUP, "does not support");
        }
    }
}

#[test]
fn data_that_is_too_long_is_drained_up_to_a_limit() {
    let known = [NBD_OPT_LIST, NBD_OPT_INFO, NBD_OPT_GO, NBD_OPT_ABORT];
    let contexts = [NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT];
    for kind in known.into_iter().chain(contexts) {
        for len in [OPTION_BYTES_MAX as usize + 1, OPTION_DRAIN_MAX as usize] {
            assert_refused(&option(kind, &vec![0; len]), kind, NBD_REP_ERR_TOO_BIG, "longer");
        }
    }
    for kind in [NBD_OPT_GO, NBD_OPT_EXPORT_NAME, 99] {
        for len in [OPTION_DRAIN_MAX + 1, u32::MAX] {
            let header = [&IHAVEOPT.to_be_bytes()[..], &kind.to_be_bytes(), &len.to_be_bytes()].concat();
            let outcome = feed(&[fixed(), header].concat(), &ALL);
            assert_eq!(outcome.progress, Progress::Close(CloseReason::OptionTooLong { option: kind, len }));
        }
    }
}

#[test]
fn an_option_without_its_magic_closes() {
    let mut bytes = option(NBD_OPT_LIST, &[]);
    bytes[7] ^= 1;
    let outcome = feed(&[fixed(), bytes].concat(), &ALL);
    assert_eq!(outcome.progress, Progress::Close(CloseReason::BadMagic(IHAVEOPT ^ 1)));
}

#[test]
fn a_client_without_fixed_newstyle_can_only_name_an_export() {
    let outcome = feed(&[client_flags(0), info(NBD_OPT_GO, "vol0", &[])].concat(), &ALL);
    assert_eq!(outcome.progress, Progress::Close(CloseReason::NotFixedNewstyle(NBD_OPT_GO)));
}

#[test]
fn options_without_end_are_ended() {
    let mut input = fixed();
    for _ in 0..OPTIONS_MAX {
        input.extend(option(NBD_OPT_LIST, &[]));
    }
    assert_eq!(feed(&input, &ALL).progress, Progress::Continue);
    input.extend(option(NBD_OPT_LIST, &[]));
    assert_eq!(feed(&input, &ALL).progress, Progress::Close(CloseReason::TooManyOptions));
}

#[test]
fn a_client_that_is_not_admitted_is_told_why_and_may_go_on() {
    let refusal = Err(ExportRefusal::Policy("volume vol0 is attached by n2".into()));
    let twice = [fixed(), info(NBD_OPT_GO, "vol0", &[]), info(NBD_OPT_INFO, "vol0", &[])].concat();
    let outcome = feed_with(&twice, &ALL, refusal.clone());
    assert_eq!((outcome.progress, outcome.left), (Progress::Continue, 0));
    let replies = replies(&outcome.sent);
    assert_eq!(replies[0], (NBD_OPT_GO, NBD_REP_ERR_POLICY, b"volume vol0 is attached by n2".to_vec()));
    assert_eq!((replies[1].0, replies[1].1), (NBD_OPT_INFO, NBD_REP_INFO));

    let by_name = [fixed(), option(NBD_OPT_EXPORT_NAME, b"vol0")].concat();
    let outcome = feed_with(&by_name, &ALL, refusal);
    assert!(outcome.sent.is_empty());
    let Progress::Close(CloseReason::ExportNameRefused { name, .. }) = outcome.progress else {
        panic!("{:?}", outcome.progress)
    };
    assert_eq!(name, "vol0");
}

#[test]
fn a_refusal_longer_than_a_string_may_be_is_cut() {
    struct Wordy;
    impl Exports for Wordy {
        fn list(&self) -> Vec<String> {
            vec!["y".repeat(STRING_BYTES_MAX + 1), "short".into()]
        }
        fn open(&self, _: &str) -> Result<ExportInfo, ExportRefusal> {
            Err(ExportRefusal::Policy(format!("x{}", "\u{e9}".repeat(STRING_BYTES_MAX))))
        }
        fn admit(&self, _: &str, _: Peer) -> Admitting {
            panic!("a negotiation admits nobody");
        }
    }
    let outcome = feed(&[fixed(), info(NBD_OPT_GO, "v", &[]), option(NBD_OPT_LIST, &[])].concat(), &Wordy);
    let replies = replies(&outcome.sent);
    assert_eq!(std::str::from_utf8(&replies[0].2).unwrap().len(), STRING_BYTES_MAX - 1);
    assert_eq!(replies[1].2, b"\0\0\0\x05short");
    assert_eq!(replies.len(), 3);
}

/// It is the last of its option's replies.
fn is_final((_, reply, _): &(u32, u32, Vec<u8>)) -> bool {
    ![NBD_REP_INFO, NBD_REP_SERVER, NBD_REP_META_CONTEXT].contains(reply)
}

const QUERIES: [&str; 5] = ["base:", "base:allocation", "blkrepl:dirty", "x-none:", "colonless"];

fn any_option() -> impl Strategy<Value = Vec<u8>> {
    let data = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..64),
        ("(vol0|away|late|none|)", proptest::collection::vec(0u16..5, 0..4))
            .prop_map(|(name, wanted)| info_data(name.as_bytes(), &wanted)),
        ("(vol0|away|late|none|)", proptest::collection::vec(prop::sample::select(&QUERIES[..]), 0..4))
            .prop_map(|(name, queries)| contexts_data(name.as_bytes(), &queries)),
    ];
    (0u32..13, data).prop_map(|(kind, data)| option(kind, &data))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        feed(&bytes, &ALL);
        feed(&[&fixed(), &bytes[..]].concat(), &ALL);
    }

    /// The model knows of each option what its final reply is after those before it, and whether the session goes
    /// on.
    #[test]
    fn each_option_is_answered_as_the_model_says(
        options in proptest::collection::vec(
            (0u32..13, "(vol0|away|late|none|)", proptest::collection::vec(0u16..5, 0..4), 0u8..8), 0..14),
    ) {
        let mut input = fixed();
        let mut expected = Vec::new();
        let mut goes_on = true;
        let (mut form, mut selected) = (Replies::Simple, Vec::new());
        for (kind, name, wanted, shape) in options {
            // Mostly data as such an option has them; none, a byte too few, or more than is looked at.
            let contexts = [NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT].contains(&kind);
            let queries: Vec<&str> = wanted.iter().map(|n| QUERIES[usize::from(*n)]).collect();
            let whole = if contexts {
                contexts_data(name.as_bytes(), &queries)
            } else {
                info_data(name.as_bytes(), &wanted)
            };
            let data = match shape {
                0 => Vec::new(),
                1 => whole[..whole.len() - 1].to_vec(),
                2 => vec![b'x'; OPTION_BYTES_MAX as usize + 1],
                _ => whole,
            };
            input.extend(option(kind, &data));
            if !goes_on {
                continue;
            }
            let known = [
                NBD_OPT_ABORT, NBD_OPT_LIST, NBD_OPT_INFO, NBD_OPT_GO, NBD_OPT_STRUCTURED_REPLY,
                NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT, NBD_OPT_EXTENDED_HEADERS,
            ];
            let no_data = [NBD_OPT_LIST, NBD_OPT_STRUCTURED_REPLY, NBD_OPT_EXTENDED_HEADERS].contains(&kind);
            let reply = match kind {
                // Its data is no name: it holds zeroes, is empty (there are three volumes), or too long.
                NBD_OPT_EXPORT_NAME => None,
                _ if !known.contains(&kind) => Some(NBD_REP_ERR_UNSUP),
                _ if shape == 2 => Some(NBD_REP_ERR_TOO_BIG),
                NBD_OPT_ABORT => Some(NBD_REP_ACK),
                _ if no_data && !data.is_empty() => Some(NBD_REP_ERR_INVALID),
                NBD_OPT_STRUCTURED_REPLY if form == Replies::Extended => Some(NBD_REP_ERR_EXT_HEADER_REQD),
                _ if no_data => Some(NBD_REP_ACK),
                _ if shape < 2 || contexts && form == Replies::Simple => Some(NBD_REP_ERR_INVALID),
                _ => Some(match name.as_str() {
                    "vol0" => NBD_REP_ACK,
                    "away" => NBD_REP_ERR_POLICY,
                    "late" => NBD_REP_ERR_SHUTDOWN,
                    _ => NBD_REP_ERR_UNKNOWN,
                }),
            };
            match (kind, reply == Some(NBD_REP_ACK)) {
                (NBD_OPT_STRUCTURED_REPLY, true) => form = Replies::Structured,
                (NBD_OPT_EXTENDED_HEADERS, true) => form = Replies::Extended,
                (NBD_OPT_SET_META_CONTEXT, true) => {
                    selected = BOTH.into_iter().filter(|name| queries.contains(name)).collect();
                }
                (NBD_OPT_SET_META_CONTEXT, false) => selected.clear(),
                _ => {}
            }
            let entered = kind == NBD_OPT_GO && reply == Some(NBD_REP_ACK);
            let aborted = kind == NBD_OPT_ABORT && reply == Some(NBD_REP_ACK);
            goes_on = reply.is_some() && !entered && !aborted;
            expected.extend(reply.map(|reply| (kind, reply)));
        }
        let outcome = feed(&input, &ALL);
        let finals: Vec<(u32, u32)> =
            replies(&outcome.sent).into_iter().filter(is_final).map(|r| (r.0, r.1)).collect();
        prop_assert_eq!(finals, expected);
        prop_assert_eq!(outcome.progress == Progress::Continue, goes_on);
        if let Progress::Transmission(Terms { replies, contexts, .. }) = outcome.progress {
            prop_assert_eq!(replies, form);
            prop_assert_eq!(contexts.iter().map(MetaContext::name).collect::<Vec<_>>(), selected);
        }
    }

    #[test]
    fn any_options_in_any_order_get_their_replies(options in proptest::collection::vec(any_option(), 0..12)) {
        let outcome = feed(&[fixed(), options.concat()].concat(), &ALL);
        let asks_for_tls = outcome.sent.windows(4).any(|word| word == (NBD_REP_FLAG_ERROR + 5).to_be_bytes());
        prop_assert!(!asks_for_tls, "NBD_REP_ERR_TLS_REQD from a server without TLS");
        if outcome.progress == Progress::Continue {
            prop_assert_eq!(outcome.left, 0);
            let finals = replies(&outcome.sent).into_iter().filter(is_final).count();
            prop_assert_eq!(finals, options.len(), "each option has exactly one final reply");
        }
    }
}

#[test]
fn a_node_tells_where_a_volume_is() {
    let replies = replies_to(&option(NBD_OPT_BLKREPL_NODES, b"away"), &ALL);
    let entry = |text: &[u8], primary| [&[0, 0, 0, 4], text, &[primary]].concat();
    let nodes = NBD_OPT_BLKREPL_NODES;
    // An address that the protocol cannot carry is left out.
    assert_eq!(
        replies,
        [
            (nodes, NBD_REP_SERVER, entry(b"n1:1", 0)),
            (nodes, NBD_REP_SERVER, entry(b"n2:2", 1)),
            (nodes, NBD_REP_ACK, Vec::new())
        ]
    );
    assert_refused(&option(nodes, b"nix"), nodes, NBD_REP_ERR_UNKNOWN, "no volume \"nix\"");
    assert_refused(&option(nodes, b"\xff"), nodes, NBD_REP_ERR_INVALID, "not the name of a volume");
}

#[test]
fn a_connection_joins_a_client_session() {
    let id = 0x1122_3344_5566_7788_99aa_bbcc_ddee_ff00_u128;
    let session = ClientSession { id, generation: 0x0102_0304_0506_0708 };
    let data = [&id.to_be_bytes()[..], &session.generation.to_be_bytes()].concat();
    let join = option(NBD_OPT_BLKREPL_SESSION, &data);
    assert_eq!(replies_to(&join, &ALL), [(NBD_OPT_BLKREPL_SESSION, NBD_REP_ACK, Vec::new())]);
    for last in [option(NBD_OPT_EXPORT_NAME, b"vol0"), info(NBD_OPT_GO, "vol0", &[])] {
        let outcome = feed(&[fixed(), join.clone(), last].concat(), &ALL);
        let Progress::Transmission(terms) = outcome.progress else { panic!("{:?}", outcome.progress) };
        assert_eq!(terms.session, Some(session));
    }
    for bad in [&b""[..], b"short", &[0; 16], &[0; 23], &[0; 25]] {
        let (option, text) = (option(NBD_OPT_BLKREPL_SESSION, bad), "16 bytes");
        assert_refused(&option, NBD_OPT_BLKREPL_SESSION, NBD_REP_ERR_INVALID, text);
    }
}

#[test]
fn the_lineage_is_told_to_who_asks() {
    let wanted = info(NBD_OPT_INFO, "vol0", &[NBD_INFO_BLKREPL_LINEAGE]);
    let said = [&NBD_INFO_BLKREPL_LINEAGE.to_be_bytes()[..], &LINEAGE.to_be_bytes()].concat();
    let replies = replies_to(&wanted, &ALL);
    assert!(replies.contains(&(NBD_OPT_INFO, NBD_REP_INFO, said.clone())), "{replies:?}");
    let unasked = replies_to(&info(NBD_OPT_INFO, "vol0", &[]), &ALL);
    assert!(!unasked.contains(&(NBD_OPT_INFO, NBD_REP_INFO, said)));
}
