//! What a machine is to be like.

/// How a machine comes to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Linux as a program (User Mode Linux 6.1): near the speed of this machine, one processor, and a disk whose
    /// cache is this machine's, so that a cut of power loses what the guest's kernel had not written.
    Uml,
    /// Debian's stock kernel under qemu: with KVM where the processor has virtualisation, else emulated.
    Qemu,
}

impl Kind {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Uml => "uml",
            Self::Qemu => "qemu",
        }
    }
}

/// What runs in a machine beside its commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Init {
    /// Nothing: file systems, loopback, and the agent.
    Quick,
    /// systemd and udev, with what is enabled in the root file system.
    Systemd,
}

/// A disk of a machine, which outlives cuts of power and boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskKind {
    /// A sparse file.
    File,
    /// A [`Disk`](crate::disk::Disk), which loses what was not flushed when power is cut; qemu only. The seed draws
    /// what is lost.
    Volatile {
        /// Seed of the losses.
        seed: u64,
    },
}

/// What a machine is to be like.
#[derive(Clone, Debug)]
pub struct VmOptions {
    /// How it comes to be.
    pub kind: Kind,
    /// What runs in it.
    pub init: Init,
    /// Its memory.
    pub memory_mib: u32,
    /// Its processors; Linux as a program has one, whatever stands here.
    pub cpus: u32,
    /// Its disks beside the root file system: their bytes (a multiple of 4096) and their kind.
    pub disks: Vec<(u64, DiskKind)>,
    /// More words for its kernel's command line.
    pub words: Vec<String>,
}

impl VmOptions {
    /// A machine with a quick boot, 1 GiB of memory, two processors and no further disks.
    #[must_use]
    pub fn new(kind: Kind) -> Self {
        Self { kind, init: Init::Quick, memory_mib: 1024, cpus: 2, disks: Vec::new(), words: Vec::new() }
    }

    /// With systemd.
    #[must_use]
    pub fn systemd(mut self) -> Self {
        self.init = Init::Systemd;
        self
    }

    /// With a further disk.
    #[must_use]
    pub fn disk(mut self, len: u64, kind: DiskKind) -> Self {
        self.disks.push((len, kind));
        self
    }
}
