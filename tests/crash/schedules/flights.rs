//! Requests of a queue that are with the disk, without a future, while others change
//! what they know: their clusters, their blocks, and whether anybody waits for them.

use std::ops::Range;

use qcow2rs::io::sim::{Hold, OpKind, Task};
use qcow2rs::{Buffer, Completion, ErrorKind, Image, SimQueue, WriteFlags};

use super::super::oracle::{Change, Ticket};
use super::super::queue_runs::give_way;
use super::super::random::{SMALL, config};
use super::super::scenario::Config;
use super::super::support::builder::Kind;
use super::scene::{Before, Scene};
use super::{play, tiny};

fn stored(config: &Config, seed: u64) -> Scene {
    let scene = Scene::new(config, seed, |cluster| match cluster {
        0..16 => Before::Stored,
        _ => Before::Nothing,
    });
    // Where everything is has to be known.
    scene.play(scene.read(0..1)).unwrap();
    scene
}

fn queue(scene: &Scene) -> (std::sync::Arc<Image>, SimQueue) {
    let image = Image::simulated(scene.image.clone());
    let queue = SimQueue::new(&image, &scene.disk, 4).unwrap();
    (image, queue)
}

fn aligned(bytes: &[u8]) -> Buffer {
    let mut buffer = Buffer::aligned(bytes.len()).unwrap();
    buffer.copy_from_slice(bytes);
    buffer
}

/// Asks for a write.
fn write(scene: &Scene, queue: &SimQueue, sectors: Range<u64>) -> Ticket {
    scene.disk.note(format!("a flight writes sectors {sectors:x?}"));
    let ticket = scene.oracle.borrow_mut().begin(Change::Write, sectors);
    queue.write(aligned(&ticket.data()), ticket.offset(), WriteFlags::default(), 1).unwrap();
    ticket
}

/// Waits for the one request that is in flight.
async fn one(queue: &SimQueue) -> Completion {
    let mut done = None;
    while done.is_none() {
        // Signals may end it.
        let _ = queue.wait(1, 1, |completion| done = Some(completion)).await;
    }
    done.unwrap()
}

/// Frees the clusters of what the hold has caught, and others, and has many written.
async fn give_and_take(scene: &Scene, hold: &Hold) {
    assert!(hold.caught().await);
    hold.close();
    scene.discard(0..scene.cluster(8).start).await.unwrap();
    scene.flush().await.unwrap();
    scene.write_clusters(20..40).await.unwrap();
    scene.flush().await.unwrap();
    scene.write_clusters(40..60).await.unwrap();
    hold.release();
}

#[test]
fn the_cluster_that_a_flight_writes_to_is_not_given_to_another() {
    play(|seed| {
        let scene = stored(&tiny(), seed);
        let (_image, queue) = queue(&scene);
        let hold = scene.hold_next_write(scene.cluster(3).start);
        let ticket = write(&scene, &queue, scene.cluster(3));
        queue.submit().unwrap();
        scene.run(vec![
            Task::new("flight", async {
                one(&queue).await.result.unwrap();
                scene.oracle.borrow_mut().end(&ticket, true, false);
            }),
            Task::new("others", give_and_take(&scene, &hold)),
        ]);
        scene.read_all();
        scene.crash(1);
        drop(queue);
        scene.close();
    });
}

#[test]
fn the_cluster_that_a_flight_reads_is_not_given_to_another() {
    play(|seed| {
        let scene = stored(&tiny(), seed);
        let (_image, queue) = queue(&scene);
        let cluster = scene.cluster(3);
        let hold = scene.hold(OpKind::Read);
        let begun = scene.oracle.borrow_mut().begin_read();
        queue.read(aligned(&[0xee; 512]), cluster.start * 512, 1).unwrap();
        queue.submit().unwrap();
        scene.run(vec![
            Task::new("flight", async {
                let done = one(&queue).await;
                done.result.unwrap();
                let buffer = done.buffer.unwrap();
                let seen = scene.oracle.borrow_mut().end_read(begun, cluster.start * 512, &buffer);
                seen.unwrap_or_else(|what| scene.fail(what));
            }),
            Task::new("others", give_and_take(&scene, &hold)),
        ]);
        drop(queue);
        scene.close();
    });
}

/// A write of a part of a block reads the block and writes it back: a flight that
/// writes all of it comes before or after that.
#[test]
fn a_flight_is_not_undone_by_a_write_of_a_part_of_its_block() {
    play(|seed| {
        let coarse = Kind { cluster: 4096, size: 256 << 10, ..SMALL };
        let scene = stored(&Config { alignment: 4096, ..config(coarse) }, seed);
        let (_image, queue) = queue(&scene);
        let hold = scene.hold_next_write(0);
        scene.run(vec![
            Task::new("part", async { scene.write(0..1).await.unwrap() }),
            Task::new("flight", async {
                assert!(hold.caught().await);
                let ticket = write(&scene, &queue, 0..8);
                queue.submit().unwrap();
                let mut result = None;
                for _ in 0..200 {
                    queue.reap(1, |completion| result = Some(completion.result)).unwrap();
                    give_way().await;
                }
                hold.release();
                match result {
                    Some(result) => result,
                    None => one(&queue).await.result,
                }
                .unwrap();
                scene.oracle.borrow_mut().end(&ticket, true, false);
            }),
        ]);
        scene.read_all();
        drop(queue);
        scene.close();
    });
}

#[test]
fn a_flight_that_is_given_up_is_over() {
    play(|seed| {
        let scene = stored(&tiny(), seed);
        let (image, queue) = queue(&scene);
        let hold = scene.hold_next_write(scene.cluster(3).start);
        let ticket = write(&scene, &queue, scene.cluster(3));
        queue.submit().unwrap();
        if seed % 2 == 0 {
            // It may not have been handed over.
            scene.play(async { _ = hold.caught().await });
        }
        image.abandon().unwrap();
        assert_eq!(scene.disk.in_flight(), 0, "the disk is at work on it");
        scene.oracle.borrow_mut().end(&ticket, false, false);
        let mut done = Vec::new();
        queue.reap(2, |completion| done.push(completion)).unwrap();
        let completion = done.pop().unwrap();
        assert!(done.is_empty());
        assert_eq!(completion.result.unwrap_err().kind(), ErrorKind::Cancelled);
        assert_eq!(completion.buffer.unwrap(), ticket.data());
        scene.crash(1);
    });
}
