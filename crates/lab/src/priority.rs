//! Threads that keep time (the emulator's, the probe's) go before everything else on the machine, if they may.

use std::num::NonZeroU64;
use std::time::Duration;

use rustix::thread::ClockId;

/// Raises the calling thread, as far as it is allowed to; without privileges it stays as it is.
pub(crate) fn raise() {
    // 1 ns: sleep as exactly as the timer can. Refusal leaves the default of 50 us.
    let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
    let parameters = libc::sched_param { sched_priority: 1 };
    // Reset-on-fork: what this thread might start must not inherit a real-time priority.
    let policy = libc::SCHED_RR | libc::SCHED_RESET_ON_FORK;
    // SAFETY: reads `parameters`, which lives through the call; 0 is the calling thread.
    let refused = unsafe { libc::sched_setscheduler(0, policy, &parameters) } != 0;
    if refused {
        let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), -10);
    }
}

/// CPU time of the calling thread.
pub(crate) fn thread_cpu() -> Duration {
    let time = rustix::time::clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
