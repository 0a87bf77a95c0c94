//! `no_io_uring PROGRAM ARGS..`: runs a program under a seccomp filter that answers io_uring_setup with
//! EPERM, which is what a container runtime's profile or `kernel.io_uring_disabled` does. The filter
//! binds this process and what it becomes, nothing else on the machine.

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

/// The same number on every architecture.
const NR_IO_URING_SETUP: u32 = 425;

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let Some(program) = args.next() else {
        eprintln!("usage: no_io_uring PROGRAM ARGS..");
        return ExitCode::from(2);
    };
    if let Err(error) = forbid() {
        eprintln!("no_io_uring: the kernel refuses the filter: {error}");
        return ExitCode::from(3);
    }
    let error = Command::new(&program).args(args).exec();
    eprintln!("no_io_uring: {}: {error}", program.display());
    ExitCode::from(4)
}

fn forbid() -> std::io::Result<()> {
    let code = |parts: u32| u16::try_from(parts).unwrap_or(u16::MAX);
    let errno = u32::try_from(libc::EPERM).unwrap_or(1);
    let mut filter = [
        // The system call's number is the first word of seccomp_data.
        libc::sock_filter { code: code(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS), jt: 0, jf: 0, k: 0 },
        libc::sock_filter {
            code: code(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K),
            jt: 0,
            jf: 1,
            k: NR_IO_URING_SETUP,
        },
        libc::sock_filter {
            code: code(libc::BPF_RET | libc::BPF_K),
            jt: 0,
            jf: 0,
            k: libc::SECCOMP_RET_ERRNO | errno,
        },
        libc::sock_filter {
            code: code(libc::BPF_RET | libc::BPF_K),
            jt: 0,
            jf: 0,
            k: libc::SECCOMP_RET_ALLOW,
        },
    ];
    let program = libc::sock_fprog { len: 4, filter: filter.as_mut_ptr() };
    // SAFETY: plain flags, no pointers.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: `program` and the filter it points to live until the call returns; the kernel copies both.
    if unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}
