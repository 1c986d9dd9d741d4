//! Lines with the time, and one line at the bottom that changes while something goes on.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Where output is no terminal, what goes on is told this often.
const PLAIN_EVERY: Duration = Duration::from_secs(2);

/// Columns of the changing line, so that it never wraps.
const COLUMNS: usize = 110;

pub struct Screen {
    began: Instant,
    terminal: bool,
    /// The changing line is on the screen.
    live: bool,
    told: Option<Instant>,
}

impl Screen {
    pub fn new() -> Screen {
        Screen {
            began: Instant::now(),
            terminal: std::io::stdout().is_terminal(),
            live: false,
            told: None,
        }
    }

    /// A line that stays, with the time since the start.
    pub fn say(&mut self, text: &str) {
        let seconds = self.began.elapsed().as_secs_f64();
        self.put(&format!("{seconds:6.1} s  {text}"));
    }

    /// A line that stays, as it is.
    pub fn put(&mut self, text: &str) {
        self.clear();
        self.write(&format!("{text}\n"));
        self.told = Some(Instant::now());
    }

    /// How it goes; replaced by whatever comes next.
    pub fn live(&mut self, text: &str) {
        if self.terminal {
            let seconds = self.began.elapsed().as_secs_f64();
            let line: String = format!("{seconds:6.1} s  {text}")
                .chars()
                .take(COLUMNS)
                .collect();
            self.clear();
            self.write(&line);
            self.live = true;
        } else if self.told.is_none_or(|told| told.elapsed() >= PLAIN_EVERY) {
            self.say(text);
        }
    }

    /// Runs something that cannot tell how far it is, with the seconds counting beside it.
    pub fn while_doing<R: Send>(&mut self, what: &str, work: impl FnOnce() -> R + Send) -> R {
        std::thread::scope(|scope| {
            let began = Instant::now();
            let thread = scope.spawn(work);
            while !thread.is_finished() {
                self.live(&format!("{what} ... {} s", began.elapsed().as_secs()));
                std::thread::sleep(Duration::from_millis(100));
            }
            self.clear();
            match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    fn clear(&mut self) {
        if std::mem::take(&mut self.live) {
            // To the line's start, and erase to its end (ECMA-48: EL).
            self.write("\r\x1b[K");
        }
    }

    /// A reader that has seen enough (`| head`) is no error.
    fn write(&self, text: &str) {
        let mut out = std::io::stdout().lock();
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.clear();
    }
}
