//! Machines with a kernel and a system of their own, in which commands are run: a real `/dev/nbdX`, systemd and udev,
//! PostgreSQL, DRBD. Each boots the same root file system (`tests/vm/build`) under an overlay of its own.
//!
//! Commands run as root. The directory [`Vm::share`] is `/host` in the machine, and `/host/bin` is first in its PATH.
//! A machine has its loopback interface and no other network. Its kernel's log goes to [`Vm::console`], what
//! programs write to `/dev/vm-log` to [`Vm::log`], both at once, so that they are there after a crash.
//!
//! Disks and the overlay outlive cuts of power; dropping the [`Vm`] ends the machine and removes all. Nothing of
//! a guest's packages is installed on this machine.

mod image;
mod machine;
mod options;
mod qemu;
mod share;
mod uml;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use tempfile::TempDir;

use crate::cluster::scratch_dir;
use crate::disk::Disk;
use crate::proc::{Finished, run, tail, which};
pub use image::{Image, unavailable};
use machine::Machine;
pub use options::{DiskKind, Init, Kind, VmOptions};
pub use share::Job;
use share::Share;

/// Longest time from power on to an agent that answers, with an emulated processor on a busy machine.
pub const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// Longest time of a clean end.
pub const SHUT_DOWN_LIMIT: Duration = Duration::from_secs(90);
/// What a machine may need beyond a command's limit to tell its end.
const GRACE: Duration = Duration::from_secs(30);
const STEP_LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(5);

/// A disk beside the root file system.
pub enum Drive {
    /// A sparse file.
    File(PathBuf),
    /// A disk that loses what was not flushed.
    Volatile(Disk),
}

/// Where a machine's files are.
struct Files {
    dir: PathBuf,
    share: PathBuf,
    console: PathBuf,
    log: PathBuf,
}

/// A machine, on or off.
pub struct Vm {
    // Before the disks that it uses, and the directory in which everything is.
    machine: Option<Mutex<Machine>>,
    options: VmOptions,
    image: Image,
    files: Files,
    share: Share,
    drives: Vec<Drive>,
    boots: u32,
    /// Of a machine that is bound to one.
    processor: Option<uml::Processor>,
    _dir: TempDir,
}

impl Vm {
    /// A machine that is off, with disks that read as zeroes.
    ///
    /// # Errors
    /// Where the root file system is not built, or files cannot be made.
    pub fn new(options: VmOptions) -> Result<Self> {
        let image = Image::find()?;
        let dir = scratch_dir()?;
        let at = |name: &str| dir.path().join(name);
        let files = Files {
            dir: dir.path().to_owned(),
            share: at("share"),
            console: at("console.log"),
            log: at("guest.log"),
        };
        let share = Share::new(files.share.clone())?;
        let mut drives = Vec::new();
        for (index, (len, kind)) in options.disks.iter().enumerate() {
            drives.push(new_drive(dir.path(), &format!("disk{index}"), *len, *kind)?);
        }
        if options.kind == Kind::Qemu {
            qemu::prepare(&image, dir.path())?;
        }
        let processor = match options.kind {
            Kind::Uml => Some(uml::Processor::take()?),
            Kind::Qemu => None,
        };
        Ok(Self { machine: None, options, image, files, share, drives, boots: 0, processor, _dir: dir })
    }

    /// A machine that is on.
    ///
    /// # Errors
    /// As [`new`](Self::new) and [`boot`](Self::boot).
    pub fn booted(options: VmOptions) -> Result<Self> {
        let mut vm = Self::new(options)?;
        vm.boot()?;
        Ok(vm)
    }

    /// Turns it on and waits until it takes commands; how long that took. With systemd other units may still start
    /// then, see [`wait_started`](Self::wait_started).
    ///
    /// # Errors
    /// If it does not come up, with the end of its console.
    pub fn boot(&mut self) -> Result<Duration> {
        ensure!(self.machine.is_none(), "the machine runs already");
        self.boots += 1;
        for drive in &self.drives {
            if let Drive::Volatile(disk) = drive {
                disk.restore_power();
            }
        }
        let begun = Instant::now();
        let boot = format!("boot{}", self.boots);
        let mut command = self.command(&boot)?;
        self.machine = Some(Mutex::new(Machine::start(&mut command, &self.files.console)?));
        while !self.share.is_ready(&boot) {
            self.ensure_runs()?;
            if begun.elapsed() >= BOOT_LIMIT {
                bail!("the machine takes no commands after {BOOT_LIMIT:?}\n{}", self.consoles());
            }
            std::thread::sleep(POLL);
        }
        Ok(begun.elapsed())
    }

    /// What runs in it from its next boot on.
    ///
    /// # Errors
    /// If it is on.
    pub fn set_init(&mut self, init: Init) -> Result<()> {
        ensure!(self.machine.is_none(), "the machine runs");
        self.options.init = init;
        Ok(())
    }

    /// Waits until systemd has started everything; what it says of the outcome, such as `running` or `degraded`.
    ///
    /// # Errors
    /// If it is not done after `limit`.
    pub fn wait_started(&self, limit: Duration) -> Result<String> {
        let done = self.run("systemctl is-system-running --wait", limit)?;
        let state = done.stdout.trim().to_owned();
        ensure!(["running", "degraded", "maintenance"].contains(&state.as_str()), "{}", done.text());
        Ok(state)
    }

    /// Runs a command (text for bash) to its end.
    ///
    /// # Errors
    /// If it still runs after `limit`, or the machine ends meanwhile; not for its exit code.
    pub fn run(&self, command: &str, limit: Duration) -> Result<Finished> {
        let job = self.start(command, limit)?;
        self.finish(&job)
    }

    /// Starts a command, which is ended in the machine after `limit`.
    ///
    /// # Errors
    /// If the machine is off.
    pub fn start(&self, command: &str, limit: Duration) -> Result<Job> {
        let mut machine = self.machine()?;
        let job = self.share.put(command, limit, GRACE)?;
        machine.request(&job.request()).with_context(|| self.consoles())?;
        Ok(job)
    }

    /// What a command left, if it has ended.
    ///
    /// # Errors
    /// If it ran into its limit.
    pub fn finished(&self, job: &Job) -> Result<Option<Finished>> {
        self.share.take(job)
    }

    /// Waits until a command ends.
    ///
    /// # Errors
    /// If it runs into its limit, or the machine ends before it.
    pub fn finish(&self, job: &Job) -> Result<Finished> {
        loop {
            if let Some(finished) = self.share.take(job)? {
                return Ok(finished);
            }
            self.ensure_runs().with_context(|| format!("while {} ran", job.shown))?;
            if Instant::now() >= job.deadline {
                bail!("the machine does not answer; it was to run {}\n{}", job.shown, self.consoles());
            }
            std::thread::sleep(POLL);
        }
    }

    /// Cuts its power: all of it ends at once, and disks with a volatile cache lose what was not flushed.
    ///
    /// # Errors
    /// If it is off.
    pub fn cut_power(&mut self) -> Result<()> {
        let machine = self.machine.take().ok_or_else(|| anyhow!("the machine is off"))?;
        machine.into_inner().unwrap_or_else(PoisonError::into_inner).kill()?;
        for drive in &self.drives {
            if let Drive::Volatile(disk) = drive {
                disk.cut_power();
            }
        }
        Ok(())
    }

    /// Shuts it down in order and waits until it is off.
    ///
    /// # Errors
    /// If that takes too long, and its power is cut, or it ends otherwise.
    pub fn shut_down(&mut self) -> Result<()> {
        let command = match self.options.init {
            Init::Quick => "busybox poweroff",
            Init::Systemd => "systemctl poweroff --no-block",
        };
        self.start(command, STEP_LIMIT)?;
        let machine = self.machine.take().ok_or_else(|| anyhow!("the machine is off"))?;
        let mut machine = machine.into_inner().unwrap_or_else(PoisonError::into_inner);
        let status = machine.wait(SHUT_DOWN_LIMIT).with_context(|| self.consoles())?;
        ensure!(status.success(), "the machine ended with {status}\n{}", self.consoles());
        Ok(())
    }

    /// True if it is on.
    #[must_use]
    pub fn runs(&self) -> bool {
        self.ensure_runs().is_ok()
    }

    /// Puts a program or a script into the machine's PATH, without what only a debugger reads.
    ///
    /// # Errors
    /// Where it cannot be copied.
    pub fn put_program(&self, program: &Path) -> Result<()> {
        let name = program.file_name().ok_or_else(|| anyhow!("{} is no program", program.display()))?;
        let to = self.files.share.join("bin").join(name);
        fs::copy(program, &to).with_context(|| format!("copy {}", program.display()))?;
        if which("strip").is_some() {
            // A script it refuses, and leaves alone.
            run(Command::new("strip").arg(&to), STEP_LIMIT)?;
        }
        Ok(())
    }

    /// The directory that is `/host` in the machine. A file that changes there after the machine has read it may look
    /// old to it, so each is to be written once.
    #[must_use]
    pub fn share(&self) -> &Path {
        self.share.dir()
    }

    /// The disks beside the root file system.
    #[must_use]
    pub fn drives(&self) -> &[Drive] {
        &self.drives
    }

    /// What the machine calls a disk, counted from zero.
    #[must_use]
    pub fn device(&self, index: u8) -> String {
        let letter = char::from(b'b' + index);
        match self.options.kind {
            Kind::Uml => format!("/dev/ubd{letter}"),
            Kind::Qemu => format!("/dev/vd{letter}"),
        }
    }

    /// All that its kernel said since it was turned on; after a crash, all that its console showed.
    #[must_use]
    pub fn kernel_log(&self) -> String {
        let said = self.run("dmesg", STEP_LIMIT).and_then(Finished::ok);
        said.map_or_else(|_| text_of(&self.files.console), |done| done.stdout)
    }

    /// The file with what its console showed, in all boots.
    #[must_use]
    pub fn console(&self) -> &Path {
        &self.files.console
    }

    /// The file with what its programs wrote to `/dev/vm-log`, in all boots.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.files.log
    }

    /// The ends of both, for messages.
    #[must_use]
    pub fn consoles(&self) -> String {
        let (console, log) = (text_of(&self.files.console), text_of(&self.files.log));
        format!("its console:\n{}\nits log:\n{}", tail(&console), tail(&log))
    }

    fn machine(&self) -> Result<MutexGuard<'_, Machine>> {
        let machine = self.machine.as_ref().ok_or_else(|| anyhow!("the machine is off"))?;
        Ok(machine.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn ensure_runs(&self) -> Result<()> {
        if let Some(status) = self.machine()?.exited()? {
            bail!("the machine ended with {status}\n{}", self.consoles());
        }
        Ok(())
    }

    fn command(&self, boot: &str) -> Result<Command> {
        let (requests, log) = match self.options.kind {
            Kind::Uml => (uml::REQUESTS, uml::LOG),
            Kind::Qemu => (qemu::REQUESTS, qemu::LOG),
        };
        let mut words = vec![
            "init=/sbin/vm-init".to_owned(),
            format!("vm.requests={requests}"),
            format!("vm.log={log}"),
            format!("vm.boot={boot}"),
        ];
        if self.options.init == Init::Quick {
            words.push("vm.mode=quick".to_owned());
        }
        words.extend(self.options.words.iter().cloned());
        let (image, options, files, drives) = (&self.image, &self.options, &self.files, &self.drives);
        match options.kind {
            Kind::Uml => uml::command(image, options, self.processor.as_ref(), files, drives, &words),
            Kind::Qemu => Ok(qemu::command(image, options, files, drives, &words)),
        }
    }
}

fn new_drive(dir: &Path, name: &str, len: u64, kind: DiskKind) -> Result<Drive> {
    match kind {
        DiskKind::Volatile { seed } => Ok(Drive::Volatile(Disk::new(dir, name, len, seed)?)),
        DiskKind::File => {
            let path = dir.join(format!("{name}.img"));
            let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
            file.set_len(len).with_context(|| format!("size {}", path.display()))?;
            Ok(Drive::File(path))
        }
    }
}

fn text_of(path: &Path) -> String {
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}
