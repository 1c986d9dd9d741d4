//! Measures a raw volume's 4 KiB random requests from the page cache.
//!
//! `cargo run --release -p whimbrel-volume --example iops -- [FILE] [QUEUE DEPTH] [SECONDS]`

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use whimbrel_volume::pool::{Pool, PoolSize};
use whimbrel_volume::raw::RawFile;

const SIZE: u64 = 256 << 20;

#[derive(Clone, Copy, Debug)]
enum Load {
    Read4K,
    Write4K,
    Read256K,
    Write256K,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().unwrap_or_else(|| "iops.img".to_owned());
    let depth: usize = args.next().map_or(Ok(32), |a| a.parse())?;
    let seconds: u64 = args.next().map_or(Ok(3), |a| a.parse())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let pool = Pool::start(PoolSize::default())?;
        let file = RawFile::create(&pool, &path, SIZE).await?;
        let piece = Bytes::from(vec![0x5a; 1 << 20]);
        for at in (0..SIZE).step_by(1 << 20) {
            file.write(at, piece.clone()).await?;
        }
        file.sync().await?;
        for load in [Load::Read4K, Load::Write4K, Load::Read256K, Load::Write256K] {
            measure(&file, load, depth, Duration::from_secs(seconds)).await?;
        }
        std::fs::remove_file(&path)?;
        Ok(())
    })
}

async fn measure(
    file: &RawFile,
    load: Load,
    depth: usize,
    time: Duration,
) -> Result<(), Box<dyn std::error::Error>> {
    let stop = Arc::new(AtomicBool::new(false));
    let count = Arc::new(AtomicU64::new(0));
    let begin = Instant::now();
    let size = match load {
        Load::Read4K | Load::Write4K => 4096,
        Load::Read256K | Load::Write256K => 256 << 10,
    };
    let tasks: Vec<_> = (0..depth as u64)
        .map(|seed| {
            let (file, stop, count) = (file.clone(), Arc::clone(&stop), Arc::clone(&count));
            tokio::spawn(async move {
                let mut state = seed + 1;
                let data = Bytes::from(vec![1; size]);
                while !stop.load(Ordering::Relaxed) {
                    state = state
                        .wrapping_mul(6364136223846793005)
                        .wrapping_add(1442695040888963407);
                    let offset = (state >> 20) % (SIZE / size as u64) * size as u64;
                    match load {
                        Load::Read4K | Load::Read256K => drop(file.read(offset, size).await?),
                        Load::Write4K | Load::Write256K => file.write(offset, data.clone()).await?,
                    }
                    count.fetch_add(1, Ordering::Relaxed);
                    // As a server would between requests.
                    tokio::task::consume_budget().await;
                }
                Ok::<(), whimbrel_volume::VolumeError>(())
            })
        })
        .collect();
    tokio::time::sleep(time).await;
    stop.store(true, Ordering::Relaxed);
    for task in tasks {
        task.await??;
    }
    let per_second = count.load(Ordering::Relaxed) as f64 / begin.elapsed().as_secs_f64();
    println!(
        "{load:?} at depth {depth}: {per_second:.0} IOPS, {:.0} MiB/s",
        per_second * size as f64 / (1 << 20) as f64
    );
    Ok(())
}
