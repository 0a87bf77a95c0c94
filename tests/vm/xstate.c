/* Lets User Mode Linux run on processors whose register state is larger than it knows (AMX: 11008 bytes).
 *
 * Linux 6.1 as UML reads and writes the vector registers of its processes with PTRACE_GETREGSET and
 * PTRACE_SETREGSET, NT_X86_XSTATE, into a buffer of a fixed size that ends with PKRU. The host cuts what does not fit
 * off a read, but refuses a write of less than everything, and UML kills its first process. Preloaded (LD_PRELOAD;
 * linux.uml is linked dynamically), this puts a buffer of the full size between: a read gives what fits, and no longer
 * says that what was cut off is there; a write sets the rest to its initial state. UML's processes cannot use
 * what is cut off anyway, since that takes an arch_prctl that UML does not have.
 *
 * Where the state fits, every call goes through as it is. It never touches another request or register set.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

/* Where the state says which parts of it are there (XSTATE_BV). */
#define PRESENT_AT 512
/* The legacy area and the header, which are always there. */
#define SMALLEST 576

static long (*next_ptrace)(int, ...);
/* Not on the stack: that of UML's kernel is 16 KiB in all. One is enough, since its kernel is one thread. */
static unsigned char whole[65536] __attribute__((aligned(64)));

__attribute__((constructor)) static void find_next(void)
{
    next_ptrace = (long (*)(int, ...))dlsym(RTLD_NEXT, "ptrace");
}

/* Which parts of the state end within len bytes. */
static uint64_t parts_within(size_t len)
{
    static size_t known_len;
    static uint64_t known;
    if (known_len == len)
        return known;
    uint64_t parts = 3;
    for (unsigned part = 2; part < 63; part++) {
        unsigned size, offset, flags, unused;
        __cpuid_count(0xd, part, size, offset, flags, unused);
        if (size && !(flags & 1) && (size_t)offset + size <= len)
            parts |= (uint64_t)1 << part;
    }
    known = parts;
    known_len = len;
    return parts;
}

static void drop_parts_beyond(unsigned char *state, size_t len)
{
    uint64_t present;
    memcpy(&present, state + PRESENT_AT, sizeof present);
    present &= parts_within(len);
    memcpy(state + PRESENT_AT, &present, sizeof present);
}

/* Bytes of the full state, which only the host knows. */
static size_t whole_len(long pid)
{
    static size_t known;
    struct iovec all = {whole, sizeof whole};
    if (!known && next_ptrace(PTRACE_GETREGSET, pid, (void *)NT_X86_XSTATE, &all) == 0)
        known = all.iov_len;
    return known;
}

static long get(long pid, struct iovec *part)
{
    struct iovec all = {whole, sizeof whole};
    long result = next_ptrace(PTRACE_GETREGSET, pid, (void *)NT_X86_XSTATE, &all);
    if (result != 0)
        return result;
    if (part->iov_len > all.iov_len)
        part->iov_len = all.iov_len;
    drop_parts_beyond(whole, part->iov_len);
    memcpy(part->iov_base, whole, part->iov_len);
    return 0;
}

static long set(long pid, struct iovec *part, size_t len)
{
    struct iovec all = {whole, len};
    memset(whole, 0, len);
    memcpy(whole, part->iov_base, part->iov_len);
    drop_parts_beyond(whole, part->iov_len);
    return next_ptrace(PTRACE_SETREGSET, pid, (void *)NT_X86_XSTATE, &all);
}

long ptrace(enum __ptrace_request request, ...)
{
    va_list args;
    va_start(args, request);
    long pid = va_arg(args, int);
    void *addr = va_arg(args, void *);
    void *data = va_arg(args, void *);
    va_end(args);
    int states = request == PTRACE_GETREGSET || request == PTRACE_SETREGSET;
    if (states && addr == (void *)NT_X86_XSTATE) {
        struct iovec *part = data;
        size_t len = part->iov_len < SMALLEST ? 0 : whole_len(pid);
        if (len > part->iov_len)
            return request == PTRACE_GETREGSET ? get(pid, part) : set(pid, part, len);
    }
    return next_ptrace(request, pid, addr, data);
}
