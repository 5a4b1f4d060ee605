//! Who takes an object away, and who is inside it.

use interleavings::capi::users::Users;
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

/// An object that may be touched while it is there.
struct Object {
    users: Users,
    there: UnsafeCell<bool>,
}

// SAFETY: `users` says who may touch `there`; the model checker sees if it is wrong.
unsafe impl Sync for Object {}

#[test]
fn nobody_is_inside_what_is_taken_away() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let object = Arc::new(Object { users: Users::default(), there: UnsafeCell::new(true) });
        let call = |object: Arc<Object>| {
            move || {
                if let Some(_user) = object.users.enter() {
                    // SAFETY: inside.
                    assert!(object.there.with(|there| unsafe { *there }));
                }
            }
        };
        let others = [thread::spawn(call(object.clone())), thread::spawn(call(object.clone()))];
        if object.users.close().is_ok() {
            // SAFETY: alone.
            object.there.with_mut(|there| unsafe { *there = false });
        }
        for other in others {
            other.join().unwrap();
        }
    });
}
