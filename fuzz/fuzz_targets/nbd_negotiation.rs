//! The libFuzzer program of [`blkrepl_fuzz::nbd_negotiation`]; holds nothing of its own.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = blkrepl_fuzz::nbd_negotiation(data);
});
