//! The libFuzzer program of [`blkrepl_fuzz::metadata_pages`]; holds nothing of its own.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = blkrepl_fuzz::metadata_pages(data);
});
