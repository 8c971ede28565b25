//! The list of system calls that a running broker may make (seccomp(2)). With any other the kernel
//! ends the process (SIGSYS), and says so in its log. An opener may make some more; any other is an
//! error to it (EPERM), since the host's libraries, by which it looks up users, try what they like.
//!
//! `docs/security.md` has the lists with their reasons; a test compares.

use std::collections::BTreeMap;

use nix::libc::{self, c_long};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter_all_threads,
};
use thiserror::Error;

use super::Role;

/// Why system calls are not filtered.
#[derive(Debug, Error)]
pub enum FilterError {
    /// There is no filter for this kind of processor.
    #[error("the filter cannot be made: {0}")]
    Backend(#[from] BackendError),
    /// The kernel refused.
    #[error("the kernel does not take the filter (CONFIG_SECCOMP_FILTER): {0}")]
    Kernel(#[from] seccompiler::Error),
}

/// When a call is allowed. Arguments are counted from 0.
#[derive(Clone, Copy, Debug)]
enum When {
    Always,
    /// The argument has one of these values.
    Only(u8, &'static [c_long]),
    /// The argument has these bits clear and these set.
    Bits(u8, Clear, Set),
    /// The argument is the process's own number.
    Own(u8),
    /// The argument is no address.
    Null(u8),
}

#[derive(Clone, Copy, Debug)]
struct Clear(libc::c_int);

#[derive(Clone, Copy, Debug)]
struct Set(libc::c_int);

/// A call's name, number, when it is allowed, and that in words.
type Call = (&'static str, c_long, When, &'static str);

/// Calls that are needed for the same reason.
struct Group {
    /// For the documentation, which is compared with it.
    #[cfg_attr(not(test), allow(dead_code))]
    reason: &'static str,
    calls: &'static [Call],
}

const fn any(name: &'static str, number: c_long) -> Call {
    (name, number, When::Always, "")
}

/// Of the flags of open(2), those that a file is changed or made by.
const WRITES: Clear = Clear(libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC);
const READ_ONLY: &str = "for reading";
const NOT_EXECUTABLE: Clear = Clear(libc::PROT_EXEC);
const NO_EXEC: &str = "no PROT_EXEC";
/// Flags that make a thread of a process, and those that would give it a world of its own.
const THREAD: Set = Set(libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD);
const NAMESPACES: Clear = Clear(
    libc::CLONE_NEWNS
        | libc::CLONE_NEWCGROUP
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET,
);
/// fallocate(2): gives memory back, and no more.
const PUNCH: &[c_long] = &[(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as c_long];
const FCNTL: &[c_long] = &[
    libc::F_GETFD as c_long,
    libc::F_SETFD as c_long,
    libc::F_GETFL as c_long,
    libc::F_SETFL as c_long,
    libc::F_DUPFD_CLOEXEC as c_long,
    libc::F_ADD_SEALS as c_long,
    libc::F_GET_SEALS as c_long,
];
const IOCTL: &[c_long] = &[libc::FIONBIO as c_long, libc::TIOCOUTQ as c_long];
const PRCTL: &[c_long] = &[libc::PR_SET_NAME as c_long, libc::PR_SET_VMA as c_long];

/// The list.
const GROUPS: &[Group] = &[
    Group {
        reason: "memory of the program, and its own areas of a window; nothing that can be executed is mapped",
        calls: &[
            any("brk", libc::SYS_brk),
            any("madvise", libc::SYS_madvise),
            ("mmap", libc::SYS_mmap, When::Bits(2, NOT_EXECUTABLE, Set(0)), NO_EXEC),
            ("mprotect", libc::SYS_mprotect, When::Bits(2, NOT_EXECUTABLE, Set(0)), NO_EXEC),
            any("mremap", libc::SYS_mremap),
            any("munmap", libc::SYS_munmap),
        ],
    },
    Group {
        reason: "threads: a session, a relay, a clock, a client of the control socket",
        calls: &[
            (
                "clone",
                libc::SYS_clone,
                When::Bits(0, NAMESPACES, THREAD),
                "a thread of the process, in no new namespace",
            ),
            any("exit", libc::SYS_exit),
            any("futex", libc::SYS_futex),
            any("gettid", libc::SYS_gettid),
            (
                "prctl",
                libc::SYS_prctl,
                When::Only(0, PRCTL),
                "PR_SET_NAME, PR_SET_VMA: names of threads and memory",
            ),
            any("rseq", libc::SYS_rseq),
            any("sched_getaffinity", libc::SYS_sched_getaffinity),
            any("sched_yield", libc::SYS_sched_yield),
            any("set_robust_list", libc::SYS_set_robust_list),
            any("set_tid_address", libc::SYS_set_tid_address),
            any("sigaltstack", libc::SYS_sigaltstack),
        ],
    },
    Group {
        reason: "signals, and the end",
        calls: &[
            any("exit_group", libc::SYS_exit_group),
            any("getpid", libc::SYS_getpid),
            any("restart_syscall", libc::SYS_restart_syscall),
            any("rt_sigaction", libc::SYS_rt_sigaction),
            any("rt_sigprocmask", libc::SYS_rt_sigprocmask),
            any("rt_sigreturn", libc::SYS_rt_sigreturn),
            ("tgkill", libc::SYS_tgkill, When::Own(0), "to itself: abort(3)"),
            (
                "tkill",
                libc::SYS_tkill,
                When::Only(1, &[libc::SIGABRT as c_long]),
                "SIGABRT: abort(3) of musl",
            ),
        ],
    },
    Group {
        reason: "time, waiting, random numbers for hash tables",
        calls: &[
            any("clock_gettime", libc::SYS_clock_gettime),
            any("clock_nanosleep", libc::SYS_clock_nanosleep),
            any("getrandom", libc::SYS_getrandom),
            any("nanosleep", libc::SYS_nanosleep),
        ],
    },
    Group {
        reason: "connections: those that were accepted, and none is made",
        calls: &[
            any("accept4", libc::SYS_accept4),
            any("getpeername", libc::SYS_getpeername),
            any("getsockname", libc::SYS_getsockname),
            any("getsockopt", libc::SYS_getsockopt),
            any("recvfrom", libc::SYS_recvfrom),
            any("recvmsg", libc::SYS_recvmsg),
            any("sendmsg", libc::SYS_sendmsg),
            any("sendto", libc::SYS_sendto),
            (
                "setsockopt",
                libc::SYS_setsockopt,
                When::Only(1, &[libc::SOL_SOCKET as c_long]),
                "SOL_SOCKET: time limits of the control socket's clients, and whether what came out of band is looked at",
            ),
            any("shutdown", libc::SYS_shutdown),
            ("ioctl", libc::SYS_ioctl, When::Only(1, IOCTL), "FIONBIO, SIOCOUTQ: does the other side read?"),
        ],
    },
    Group {
        reason: "waiting for several, and notifications",
        calls: &[
            any("epoll_create1", libc::SYS_epoll_create1),
            any("epoll_ctl", libc::SYS_epoll_ctl),
            any("epoll_pwait", libc::SYS_epoll_pwait),
            #[cfg(target_arch = "x86_64")]
            any("epoll_wait", libc::SYS_epoll_wait),
            any("eventfd2", libc::SYS_eventfd2),
            #[cfg(target_arch = "x86_64")]
            any("poll", libc::SYS_poll),
            any("ppoll", libc::SYS_ppoll),
        ],
    },
    Group {
        reason: "what a descriptor is that a VMM sent, and its end",
        calls: &[
            any("close", libc::SYS_close),
            ("fcntl", libc::SYS_fcntl, When::Only(1, FCNTL), "flags, seals and copies of descriptors"),
            any("fstat", libc::SYS_fstat),
            any("fstatfs", libc::SYS_fstatfs),
            any("newfstatat", libc::SYS_newfstatat),
            any("statx", libc::SYS_statx),
        ],
    },
    Group {
        reason: "the log, eventfds, and copies at a peer's wish (FETCH, STORE)",
        calls: &[
            any("pread64", libc::SYS_pread64),
            any("pwrite64", libc::SYS_pwrite64),
            any("read", libc::SYS_read),
            any("readv", libc::SYS_readv),
            any("write", libc::SYS_write),
            any("writev", libc::SYS_writev),
        ],
    },
    Group {
        reason: "its own memory files: link area, control area, witness, doorbell page",
        calls: &[
            ("fallocate", libc::SYS_fallocate, When::Only(1, PUNCH), "gives memory back"),
            any("ftruncate", libc::SYS_ftruncate),
            any("memfd_create", libc::SYS_memfd_create),
        ],
    },
    Group {
        reason: "`/proc/self`: is a descriptor an eventfd, what is mapped (and, after a defect, where it was)",
        calls: &[
            any("getcwd", libc::SYS_getcwd),
            any("lseek", libc::SYS_lseek),
            #[cfg(target_arch = "x86_64")]
            ("open", libc::SYS_open, When::Bits(1, WRITES, Set(0)), READ_ONLY),
            ("openat", libc::SYS_openat, When::Bits(2, WRITES, Set(0)), READ_ONLY),
            #[cfg(target_arch = "x86_64")]
            any("readlink", libc::SYS_readlink),
            any("readlinkat", libc::SYS_readlinkat),
        ],
    },
    Group {
        reason: "its limit of descriptors, looked at for each connection",
        calls: &[("prlimit64", libc::SYS_prlimit64, When::Null(2), "changes nothing")],
    },
];

/// What an opener may call besides.
const OPENER_GROUPS: &[Group] = &[
    Group {
        reason: "sockets: made, listened on, given to their group, removed. Connected: does somebody listen on one \
                 that is there, and the host's directory of users",
        calls: &[
            ("socket", libc::SYS_socket, When::Only(0, &[libc::AF_UNIX as c_long]), "AF_UNIX"),
            any("bind", libc::SYS_bind),
            any("listen", libc::SYS_listen),
            any("connect", libc::SYS_connect),
            any("umask", libc::SYS_umask),
            #[cfg(target_arch = "x86_64")]
            any("chmod", libc::SYS_chmod),
            any("fchmodat", libc::SYS_fchmodat),
            #[cfg(target_arch = "x86_64")]
            any("chown", libc::SYS_chown),
            any("fchownat", libc::SYS_fchownat),
            #[cfg(target_arch = "x86_64")]
            any("unlink", libc::SYS_unlink),
            any("unlinkat", libc::SYS_unlinkat),
        ],
    },
    Group {
        reason: "users and groups, looked up as the host does that",
        calls: &[
            any("geteuid", libc::SYS_geteuid),
            any("getuid", libc::SYS_getuid),
            any("getdents64", libc::SYS_getdents64),
            any("faccessat", libc::SYS_faccessat),
            any("uname", libc::SYS_uname),
        ],
    },
];

/// A call that a filter cannot look into, as its flags are in memory. It is said not to be there, so
/// that libraries start threads by clone(2).
const UNSEEN: c_long = libc::SYS_clone3;

/// Filters the system calls of every thread of this process, and of those that they start. Gives
/// how many are on the list.
///
/// # Errors
/// When there is no filter for this processor, or the kernel does not take it.
pub fn restrict(role: &Role<'_>) -> Result<usize, FilterError> {
    let arch: TargetArch = std::env::consts::ARCH.try_into()?;
    // Of several filters' verdicts the strictest counts: an error before "allowed", so the second
    // has to let that call pass.
    let absent = BTreeMap::from([(UNSEEN, Vec::new())]);
    let enosys = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let first: BpfProgram = SeccompFilter::new(absent, SeccompAction::Allow, enosys, arch)?.try_into()?;
    let mut rules = BTreeMap::from([(UNSEEN, Vec::new())]);
    let (more, otherwise) = match role {
        Role::Broker => (&[][..], SeccompAction::KillProcess),
        Role::Opener { .. } => (OPENER_GROUPS, SeccompAction::Errno(libc::EPERM.unsigned_abs())),
    };
    for (_, number, when, _) in calls(GROUPS).chain(calls(more)) {
        rules.insert(*number, rule(*when)?);
    }
    let count = rules.len() - 1;
    let second = SeccompFilter::new(rules, otherwise, SeccompAction::Allow, arch)?;
    let second: BpfProgram = second.try_into()?;
    apply_filter_all_threads(&first)?;
    apply_filter_all_threads(&second)?;
    Ok(count)
}

fn calls(groups: &'static [Group]) -> impl Iterator<Item = &'static Call> {
    groups.iter().flat_map(|group| group.calls)
}

/// The conditions, of which one must hold; none: always.
fn rule(when: When) -> Result<Vec<SeccompRule>, BackendError> {
    use SeccompCmpArgLen::{Dword, Qword};
    // What the kernel takes as an int has nothing in its upper half that counts.
    let bits = |value: c_long| (value as u64) & u64::from(u32::MAX);
    let one = |condition: Result<SeccompCondition, BackendError>| SeccompRule::new(vec![condition?]);
    match when {
        When::Always => Ok(Vec::new()),
        When::Only(index, values) => values
            .iter()
            .map(|value| one(SeccompCondition::new(index, Dword, SeccompCmpOp::Eq, bits(*value))))
            .collect(),
        When::Bits(index, Clear(clear), Set(set)) => {
            let mask = bits((clear | set).into());
            let value = bits(set.into());
            Ok(vec![one(SeccompCondition::new(index, Dword, SeccompCmpOp::MaskedEq(mask), value))?])
        }
        When::Own(index) => {
            let own = std::process::id().into();
            Ok(vec![one(SeccompCondition::new(index, Dword, SeccompCmpOp::Eq, own))?])
        }
        When::Null(index) => Ok(vec![one(SeccompCondition::new(index, Qword, SeccompCmpOp::Eq, 0))?]),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// The rows of the table in the documentation.
    fn table(groups: &[Group]) -> Vec<String> {
        groups
            .iter()
            .map(|group| {
                let calls = group.calls.iter().map(|(name, _, _, words)| match words.is_empty() {
                    true => format!("`{name}`"),
                    false => format!("`{name}` ({words})"),
                });
                format!("| {} | {} |", group.reason, calls.collect::<Vec<_>>().join(", "))
            })
            .collect()
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn the_documentation_has_the_list_as_it_is() {
        let text = include_str!("../../../docs/security.md");
        for (mark, groups) in [("system calls", GROUPS), ("system calls of the opener", OPENER_GROUPS)] {
            let start = text.find(&format!("<!-- {mark} -->\n")).unwrap();
            let end = text.find(&format!("<!-- end of {mark} -->")).unwrap();
            let written: Vec<_> = text[start..end].lines().skip(3).collect();
            let table = table(groups);
            assert!(written == table, "docs/security.md should have\n{}\n", table.join("\n"));
        }
    }

    #[test]
    fn no_call_is_there_twice_and_the_filter_is_short_enough() {
        let all = || calls(GROUPS).chain(calls(OPENER_GROUPS));
        let mut numbers: Vec<_> = all().map(|(_, number, ..)| *number).collect();
        numbers.push(UNSEEN);
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), all().count() + 1);
        for (_, _, when, _) in all() {
            rule(*when).unwrap();
        }
    }
}
