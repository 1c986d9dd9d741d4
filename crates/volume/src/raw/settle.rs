//! Writing a stretch of a file out to its disk, and waiting for that.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Writes what the page cache holds of the range to the disk and waits until it is there. Not durable by that:
/// neither the file's size and map nor the disk's own cache are waited for. Blocks.
///
/// A file that has no such thing (`ESPIPE`, `EINVAL`, `ENOSYS`) is none that it would help.
pub fn write_out(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else {
        return Ok(());
    };
    if len == 0 {
        // To the kernel a length of 0 means "to the end".
        return Ok(());
    }
    let how = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: the descriptor is open as long as `file` is borrowed; the call takes no pointers.
    let result = unsafe { libc::sync_file_range(file.as_raw_fd(), offset, len, how) };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ESPIPE | libc::EINVAL | libc::ENOSYS) => Ok(()),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_written_out_and_one_beyond_the_end_is_nothing() {
        let file = tempfile::tempfile().expect("room");
        std::os::unix::fs::FileExt::write_all_at(&file, &[1; 8192], 0).expect("room");
        write_out(&file, 0, 8192).expect("written");
        write_out(&file, 1 << 30, 4096).expect("nothing to write");
        write_out(&file, 0, 0).expect("nothing to write");
    }
}
