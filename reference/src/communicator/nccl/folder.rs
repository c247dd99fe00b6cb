//! A rendezvous in a folder that all ranks see, for ranks that have no other
//! way to each other.
//!
//! ```text
//! hello-<r>                     a word that rank r has just made up
//! roster                        rank 0's name for this use, and all words
//! <name>/<n>-<operation>-<r>    what rank r brought to the n-th gather
//! <name>/left-<r>               why rank r takes no further part
//! <name>/ended-<r>              rank r has dropped its end
//! <name>-<n>-<r>/               the same for the group whose first rank is r
//! ```
//!
//! Nobody takes what an earlier use left for its own: a rank believes a roster
//! with its own word in it, and the rest of the use is in a folder of a new
//! name. The last rank to end removes that.
//!
//! A file counts once it has its final name: it is written beside and renamed.

use super::Rendezvous;
use crate::communicator::CommunicatorError;
use std::{
    collections::hash_map::RandomState,
    fs,
    hash::{BuildHasher, Hasher},
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    process, slice,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

const MEETING: &str = "the rendezvous";
/// A pause between two looks at the folder: short at first.
const PAUSES: [Duration; 2] = [Duration::from_micros(200), Duration::from_millis(10)];

/// One rank's end of a rendezvous in a folder.
pub struct FolderRendezvous {
    rank: usize,
    size: usize,
    /// The folder of this use.
    place: PathBuf,
    gathers: AtomicU64,
}

impl FolderRendezvous {
    /// Meets the other ranks in `folder`, which is there and serves one
    /// rendezvous at a time, within `limit`.
    ///
    /// # Errors
    /// The ranks that did not come, or that the folder cannot be used.
    pub fn new(
        folder: impl AsRef<Path>,
        (rank, size): (usize, usize),
        limit: Duration,
    ) -> Result<FolderRendezvous, CommunicatorError> {
        let (folder, begun) = (folder.as_ref(), Instant::now());
        let hello = |rank: usize| folder.join(format!("hello-{rank}"));
        let (own, roster) = (made_up(), folder.join("roster"));
        write(MEETING, &hello(rank), own.as_bytes())?;
        let end = |name: &str| FolderRendezvous {
            rank,
            size,
            place: folder.join(name),
            gathers: AtomicU64::new(0),
        };
        // The others have waited for these, and could not come any further.
        let silent = |otherwise: Vec<usize>| {
            let silent = (0..size).filter(|&rank| !hello(rank).exists());
            let silent: Vec<usize> = silent.collect();
            CommunicatorError::TimedOut {
                operation: MEETING,
                missing: if silent.is_empty() { otherwise } else { silent },
                limit,
            }
        };
        let joined = match rank {
            0 => {
                let name = format!("nccl-{}", made_up());
                let joined = end(&name);
                let place = &joined.place;
                fs::create_dir(place).map_err(unusable(MEETING, place))?;
                let mut written = Vec::new();
                let met = joined.meet(MEETING, &[], limit, || {
                    // A word of an earlier use may still give way to a new one.
                    let hellos: Option<Vec<String>> = (0..size).map(|r| read(&hello(r))).collect();
                    match hellos {
                        Some(hellos) if hellos != written => {
                            let lines = [slice::from_ref(&name), &hellos].concat().join("\n");
                            written = hellos;
                            write(MEETING, &roster, lines.as_bytes())
                        }
                        _ => Ok(()),
                    }
                });
                met.map_err(|error| match error {
                    CommunicatorError::TimedOut { missing, .. } => silent(missing),
                    error => error,
                })?;
                // Every rank has read it.
                let _ = fs::remove_file(&roster);
                joined
            }
            _ => {
                let name = poll(begun, limit, || {
                    let lines = read(&roster)?;
                    let mut lines = lines.lines();
                    let name = lines.next()?.to_owned();
                    (lines.nth(rank) == Some(&own)).then_some(Ok(name))
                });
                // Rank 0 did not look at what all have said.
                let name = name.unwrap_or_else(|| Err(silent(vec![0])))?;
                let joined = end(&name);
                joined.meet(MEETING, &[], limit, || Ok(()))?;
                joined
            }
        };
        let _ = fs::remove_file(hello(rank));
        Ok(joined)
    }

    /// Brings `brought` to the next gather and takes what all have brought;
    /// `while_waiting` is done between two looks.
    fn meet(
        &self,
        operation: &'static str,
        brought: &[u8],
        limit: Duration,
        mut while_waiting: impl FnMut() -> Result<(), CommunicatorError>,
    ) -> Result<Vec<Vec<u8>>, CommunicatorError> {
        let number = self.gathers.fetch_add(1, Ordering::Relaxed);
        let path = |number: u64, what: &str, rank: usize| {
            let what = what.replace(' ', "-");
            self.place.join(format!("{number}-{what}-{rank}"))
        };
        write(operation, &path(number, operation, self.rank), brought)?;
        let mut all: Vec<Option<Vec<u8>>> = vec![None; self.size];
        let met = poll(Instant::now(), limit, || {
            if let Err(error) = while_waiting() {
                return Some(Err(error));
            }
            for (rank, brought) in all.iter_mut().enumerate() {
                if brought.is_some() {
                    continue;
                }
                // Who has brought this and left since has come.
                let left = self.left(rank);
                match fs::read(path(number, operation, rank)) {
                    Ok(bytes) => *brought = Some(bytes),
                    Err(error) if error.kind() != ErrorKind::NotFound => {
                        return Some(Err(unusable(operation, &self.place)(error)));
                    }
                    Err(_) => {
                        if let Some(reason) = left {
                            return Some(Err(CommunicatorError::Left {
                                operation,
                                rank,
                                reason,
                            }));
                        }
                    }
                }
            }
            all.iter().all(Option::is_some).then_some(Ok(()))
        });
        let silent = all
            .iter()
            .enumerate()
            .filter(|(_, brought)| brought.is_none());
        let missing = silent.map(|(rank, _)| rank).collect();
        met.unwrap_or(Err(CommunicatorError::TimedOut {
            operation,
            missing,
            limit,
        }))?;
        // All have come here, and so were done with the gather before.
        self.forget(number);
        Ok(all.into_iter().flatten().collect())
    }

    /// Removes what this rank brought to the gathers before this one.
    fn forget(&self, number: u64) {
        let entries = fs::read_dir(&self.place).into_iter().flatten().flatten();
        for entry in entries {
            let name = entry.file_name().to_string_lossy().into_owned();
            let mut parts = name.split('-');
            let of = parts.next().and_then(|of| of.parse::<u64>().ok());
            let by = parts.next_back().and_then(|by| by.parse::<usize>().ok());
            if of.is_some_and(|of| of < number) && by == Some(self.rank) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    fn said(&self, what: &str, rank: usize) -> PathBuf {
        self.place.join(format!("{what}-{rank}"))
    }

    fn left(&self, rank: usize) -> Option<String> {
        let said = ["left", "ended"].map(|what| self.said(what, rank));
        said.iter().find_map(|path| read(path))
    }
}

impl Rendezvous for FolderRendezvous {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn gather(
        &self,
        operation: &'static str,
        brought: &[u8],
        limit: Duration,
    ) -> Result<Vec<Vec<u8>>, CommunicatorError> {
        self.meet(operation, brought, limit, || Ok(()))
    }

    fn split(
        &self,
        color: usize,
        limit: Duration,
    ) -> Result<Arc<dyn Rendezvous>, CommunicatorError> {
        let operation = "split";
        let number = self.gathers.load(Ordering::Relaxed);
        let own = color.to_string().into_bytes();
        let colors = self.gather(operation, &own, limit)?;
        let ranks = (0..self.size).zip(&colors);
        let members: Vec<usize> = ranks
            .filter_map(|(rank, color)| (*color == own).then_some(rank))
            .collect();
        let before = members.iter().filter(|&&rank| rank < self.rank).count();
        let first = members.first().copied().unwrap_or(self.rank);
        // Beside this one's, which it may outlive.
        let mut place = self.place.clone().into_os_string();
        place.push(format!("-{number}-{first}"));
        let place = PathBuf::from(place);
        fs::create_dir_all(&place).map_err(unusable(operation, &place))?;
        Ok(Arc::new(FolderRendezvous {
            rank: before,
            size: members.len(),
            place,
            gathers: AtomicU64::new(0),
        }))
    }

    fn leave(&self, reason: &str) {
        // Who cannot be told meets the time limit.
        let _ = write(MEETING, &self.said("left", self.rank), reason.as_bytes());
    }

    fn departed(&self) -> Option<(usize, String)> {
        let mut others = (0..self.size).filter(|&rank| rank != self.rank);
        others.find_map(|rank| Some((rank, read(&self.said("left", rank))?)))
    }
}

impl Drop for FolderRendezvous {
    fn drop(&mut self) {
        let reason = "its communicator was dropped";
        let _ = write(MEETING, &self.said("ended", self.rank), reason.as_bytes());
        if (0..self.size).all(|rank| self.said("ended", rank).exists()) {
            let _ = fs::remove_dir_all(&self.place);
        }
    }
}

/// A word that nobody else has made up, nor this process before.
fn made_up() -> String {
    // The standard library draws the keys of a hasher at random.
    let random = RandomState::new().build_hasher().finish();
    format!("{:x}-{random:016x}", process::id())
}

/// What `look` finds, looking until the limit.
fn poll<T>(begun: Instant, limit: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        let waited = begun.elapsed();
        if waited >= limit {
            return None;
        }
        thread::sleep((waited / 20).clamp(PAUSES[0], PAUSES[1]));
    }
}

fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok()
}

fn write(operation: &'static str, path: &Path, bytes: &[u8]) -> Result<(), CommunicatorError> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".tmp");
    fs::write(&beside, bytes)
        .and_then(|()| fs::rename(&beside, path))
        .map_err(unusable(operation, path))
}

fn unusable(operation: &'static str, path: &Path) -> impl Fn(io::Error) -> CommunicatorError {
    move |error| CommunicatorError::Unusable {
        operation,
        reason: format!(
            "{}: {error}; give a folder that every rank can write to",
            path.display()
        ),
    }
}
