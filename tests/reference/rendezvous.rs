//! How ranks of an NCCL communicator find each other, without NCCL.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod world;

use rstest::rstest;
use std::{
    fs,
    path::Path,
    sync::{Arc, Barrier},
    thread,
    time::Duration,
};
use tempfile::TempDir;
use ulysses::{
    CommunicatorError, FolderRendezvous, HostRendezvous, Rendezvous, ThreadCommunicator,
};
use world::TIME_LIMIT;

const SHORT: Duration = Duration::from_millis(300);

#[derive(Clone, Copy, Debug)]
enum Meeting {
    Threads,
    Folder,
}

/// Runs `body` on each rank of a rendezvous that waits for `limit`.
fn meet<T: Send>(
    (meeting, folder): (Meeting, &Path),
    size: usize,
    limit: Duration,
    body: impl Fn(&dyn Rendezvous) -> T + Sync,
) -> Vec<T> {
    let body = &body;
    thread::scope(|scope| {
        let ends = ThreadCommunicator::world(size).into_iter().enumerate();
        let ranks: Vec<_> = ends
            .map(|(rank, end)| {
                scope.spawn(move || match meeting {
                    Meeting::Threads => {
                        body(&HostRendezvous::new(Arc::new(end.with_time_limit(limit))))
                    }
                    Meeting::Folder => {
                        body(&FolderRendezvous::new(folder, (rank, size), TIME_LIMIT).unwrap())
                    }
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// What is in the folder, at any depth.
fn files(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    let mut all: Vec<String> = entries
        .flat_map(|entry| match entry.path().is_dir() {
            true => files(&entry.path()),
            false => vec![entry.path().display().to_string()],
        })
        .collect();
    all.sort();
    all
}

/// Of any length, none too.
#[rstest]
fn every_rank_gets_what_all_have_brought(
    #[values(Meeting::Threads, Meeting::Folder)] meeting: Meeting,
    #[values(1, 2, 4)] size: usize,
) {
    let folder = TempDir::new().unwrap();
    // The same folder serves one rendezvous after another.
    for use_of_it in 0..3u8 {
        let brought = |rank: usize, turn: usize| vec![use_of_it + rank as u8; rank * turn];
        meet((meeting, folder.path()), size, TIME_LIMIT, |here| {
            assert_eq!(here.size(), size);
            for turn in 0..4 {
                let own = brought(here.rank(), turn);
                let got = here.gather("a gather", &own, TIME_LIMIT).unwrap();
                let due: Vec<_> = (0..size).map(|rank| brought(rank, turn)).collect();
                assert_eq!(got, due);
            }
        });
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

/// A gather leaves nothing of the one before it.
#[test]
fn what_was_gathered_is_cleared_up() {
    let (folder, looked) = (TempDir::new().unwrap(), Barrier::new(2));
    meet((Meeting::Folder, folder.path()), 2, TIME_LIMIT, |here| {
        for _ in 0..9 {
            here.gather("a gather", b"word", TIME_LIMIT).unwrap();
        }
        looked.wait();
        assert_eq!(files(folder.path()).len(), 2);
        looked.wait();
    });
}

#[rstest]
fn groups_meet_apart(#[values(Meeting::Threads, Meeting::Folder)] meeting: Meeting) {
    let folder = TempDir::new().unwrap();
    meet((meeting, folder.path()), 5, TIME_LIMIT, |here| {
        let (rank, color) = (here.rank(), [usize::MAX, 3][here.rank() % 2]);
        let group = here.split(color, TIME_LIMIT).unwrap();
        let due: Vec<Vec<u8>> = (0..5u8)
            .filter(|&other| usize::from(other) % 2 == rank % 2)
            .map(|other| vec![other])
            .collect();
        assert_eq!((group.rank(), group.size()), (rank / 2, due.len()));
        // Each group does as much as it likes.
        for _ in 0..=rank % 2 {
            let got = group.gather("a gather", &[rank as u8], TIME_LIMIT);
            assert_eq!(got.unwrap(), due);
        }
        // And so does the whole, and a second split.
        here.gather("a gather", &[], TIME_LIMIT).unwrap();
        let again = here.split(rank, TIME_LIMIT).unwrap();
        assert_eq!((again.rank(), again.size()), (0, 1));
    });
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[rstest]
fn ranks_that_do_not_come_are_named(#[values(Meeting::Threads, Meeting::Folder)] meeting: Meeting) {
    let (folder, over) = (TempDir::new().unwrap(), Barrier::new(4));
    meet((meeting, folder.path()), 4, SHORT, |here| {
        if here.rank() % 2 == 0 {
            let due = CommunicatorError::TimedOut {
                operation: "a gather",
                missing: vec![1, 3],
                limit: SHORT,
            };
            assert_eq!(here.gather("a gather", b"word", SHORT), Err(due));
        }
        over.wait();
    });
}

#[rstest]
fn a_rank_that_has_left_is_not_waited_for(
    #[values(Meeting::Threads, Meeting::Folder)] meeting: Meeting,
) {
    let folder = TempDir::new().unwrap();
    let left = |reason: &str| CommunicatorError::Left {
        operation: "a gather",
        rank: 1,
        reason: reason.to_owned(),
    };
    let over = Barrier::new(2);
    meet((meeting, folder.path()), 2, TIME_LIMIT, |here| {
        match here.rank() {
            1 => here.leave("no more work"),
            _ => assert_eq!(
                here.gather("a gather", b"word", TIME_LIMIT),
                Err(left("no more work"))
            ),
        }
        over.wait();
    });
    // What was brought before counts, and a drop is told.
    meet((meeting, folder.path()), 2, TIME_LIMIT, |here| {
        assert!(here.gather("a gather", b"word", TIME_LIMIT).is_ok());
        if here.rank() == 0 {
            assert_eq!(
                here.gather("a gather", b"word", TIME_LIMIT),
                Err(left("its communicator was dropped"))
            );
        }
    });
}

/// Who leaves can be seen without a gather; who merely ends is no news.
#[test]
fn a_folder_tells_who_has_left() {
    let (folder, told) = (TempDir::new().unwrap(), Barrier::new(3));
    meet((Meeting::Folder, folder.path()), 3, TIME_LIMIT, |here| {
        assert_eq!(here.departed(), None);
        told.wait();
        if here.rank() == 2 {
            here.leave("on purpose");
        }
        told.wait();
        let due = (here.rank() != 2).then(|| (2, "on purpose".to_owned()));
        assert_eq!(here.departed(), due);
        told.wait();
    });
}

/// As a use leaves it whose ranks were killed, at its beginning or later.
#[test]
fn what_an_earlier_use_left_is_not_taken_for_this_one() {
    let folder = TempDir::new().unwrap();
    let file = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    file("roster", "nccl-old\nzero\none\ntwo");
    for (rank, word) in ["zero", "one", "two"].into_iter().enumerate() {
        file(&format!("hello-{rank}"), word);
    }
    fs::create_dir(folder.path().join("nccl-old")).unwrap();
    for rank in 0..3 {
        file(&format!("nccl-old/0-the-rendezvous-{rank}"), "");
        file(&format!("nccl-old/1-a-gather-{rank}"), "old");
    }
    file("nccl-old/left-1", "long ago");
    let before = files(folder.path()).len();
    meet((Meeting::Folder, folder.path()), 3, TIME_LIMIT, |here| {
        assert_eq!(here.departed(), None);
        // Rank 0 is quick, and must not find the words of the old ones.
        thread::sleep(Duration::from_millis(50) * here.rank() as u32);
        let got = here.gather("a gather", b"new", TIME_LIMIT).unwrap();
        assert_eq!(got, vec![b"new".to_vec(); 3]);
    });
    // Its roster and words are gone too; what nobody knows is let be.
    assert_eq!(files(folder.path()).len(), before - 4);
}

/// Rank 2 of three is not there when the others begin.
#[test]
fn who_does_not_come_to_the_folder_is_named() {
    let folder = TempDir::new().unwrap();
    let errors = thread::scope(|scope| {
        let ranks = [0, 1].map(|rank| {
            let folder = folder.path();
            scope.spawn(move || FolderRendezvous::new(folder, (rank, 3), SHORT).err())
        });
        ranks.map(|rank| rank.join().unwrap())
    });
    for error in errors {
        let due = CommunicatorError::TimedOut {
            operation: "the rendezvous",
            missing: vec![2],
            limit: SHORT,
        };
        assert_eq!(error, Some(due));
    }
}

#[test]
fn a_folder_that_is_not_there_is_named() {
    let error = FolderRendezvous::new("/nowhere", (0, 1), SHORT).err();
    assert_eq!(
        error.unwrap().to_string(),
        "the rendezvous: the communicator cannot be used: /nowhere/hello-0: No such file or \
         directory (os error 2); give a folder that every rank can write to"
    );
}
