; The compiled driver: runs a table of kernel calls on a team of threads. driver.py makes the tables, team.py the teams.
;
; A group is a step and those after it that need no barrier. All parts of a group are claimed from one counter:
; `remaining` counts down, and the thread that takes it from r to r - 1 does part total - r. A thread that finds nothing
; left to claim takes what it has done off `pending`; the one that takes it to 0 knows that the group is done and
; advances: it runs the groups of one part that follow by itself, then publishes the next group of several. So nobody
; waits for a thread that has claimed nothing: a late or descheduled thread delays no one.
;
; A valid claim keeps the job alive (its group cannot finish), so a thread may read the job after one, and only then.

; function, buffers, dims, parts, barrier before it
%step = type { ptr, ptr, ptr, i64, i64 }

; Words that threads fight for have two cache lines each (prefetchers fetch pairs). By field:
;  0 remaining: parts of the group that nobody has claimed; may go below 0
;  2 pending: parts of the group that are not done
;  4 finished: 1 when the job is done
;  6 active: 1 while there is a job
;  8 steps, 9 first, 10 last, 11 repeats left, 12 group, 13 its end, 14 its parts: the job
; 16 yield function, 17 idle spins, 18 busy spins, 19 workers, 20 stop, 21 begun
; 23 state of each worker: 0 runs, 1 parked, 2 parked and about to be woken
%team = type {
  i64, [15 x i64],
  i64, [15 x i64],
  i64, [15 x i64],
  i64, [15 x i64],
  ptr, i64, i64, i64, i64, i64, i64, [9 x i64],
  ptr, i64, i64, i64, i64, i64, [10 x i64],
  [0 x [16 x i64]]
}

define private void @pause() alwaysinline {
  PAUSE
  ret void
}

; One part of one step.
define private void @call(ptr %step, i64 %part) alwaysinline {
  %fn = load ptr, ptr %step
  %b = getelementptr %step, ptr %step, i64 0, i32 1
  %buffers = load ptr, ptr %b
  %d = getelementptr %step, ptr %step, i64 0, i32 2
  %dims = load ptr, ptr %d
  %p = getelementptr %step, ptr %step, i64 0, i32 3
  %parts = load i64, ptr %p
  call void %fn(ptr %buffers, ptr %dims, i64 %part, i64 %parts)
  ret void
}

; All parts of steps [first, last), one after the other.
define private void @in_order(ptr %steps, i64 %first, i64 %last) {
entry:
  br label %next
next:
  %i = phi i64 [ %first, %entry ], [ %i1, %done ]
  %more = icmp slt i64 %i, %last
  br i1 %more, label %open, label %out
open:
  %step = getelementptr %step, ptr %steps, i64 %i
  %p = getelementptr %step, ptr %step, i64 0, i32 3
  %parts = load i64, ptr %p
  br label %test
test:
  %part = phi i64 [ 0, %open ], [ %part1, %body ]
  %left = icmp slt i64 %part, %parts
  br i1 %left, label %body, label %done
body:
  call void @call(ptr %step, i64 %part)
  %part1 = add i64 %part, 1
  br label %test
done:
  %i1 = add i64 %i, 1
  br label %next
out:
  ret void
}

; One thread, no atomics.
define void @kf_serial(ptr %steps, i64 %first, i64 %last, i64 %repeats) {
entry:
  br label %test
test:
  %n = phi i64 [ 0, %entry ], [ %n1, %body ]
  %more = icmp slt i64 %n, %repeats
  br i1 %more, label %body, label %out
body:
  call void @in_order(ptr %steps, i64 %first, i64 %last)
  %n1 = add i64 %n, 1
  br label %test
out:
  ret void
}

; The group that starts at step `first`: its end and the number of its parts; at most 1 when no step of it has several,
; which is what a step has that is not worth sharing.
define private { i64, i64 } @group(ptr %steps, i64 %first, i64 %last) {
entry:
  br label %add
add:
  %i = phi i64 [ %first, %entry ], [ %i1, %test ]
  %total = phi i64 [ 0, %entry ], [ %sum, %test ]
  %most = phi i64 [ 0, %entry ], [ %most1, %test ]
  %p = getelementptr %step, ptr %steps, i64 %i, i32 3
  %parts = load i64, ptr %p
  %sum = add i64 %total, %parts
  %larger = icmp sgt i64 %parts, %most
  %most1 = select i1 %larger, i64 %parts, i64 %most
  %i1 = add i64 %i, 1
  %end = icmp eq i64 %i1, %last
  br i1 %end, label %out, label %test
test:
  %b = getelementptr %step, ptr %steps, i64 %i1, i32 4
  %barrier = load i64, ptr %b
  %joins = icmp eq i64 %barrier, 0
  br i1 %joins, label %add, label %out
out:
  %several = icmp sgt i64 %most1, 1
  %count = select i1 %several, i64 %sum, i64 %most1
  %r0 = insertvalue { i64, i64 } poison, i64 %i1, 0
  %r1 = insertvalue { i64, i64 } %r0, i64 %count, 1
  ret { i64, i64 } %r1
}

; Called by the one thread that holds the job: goes on after a finished group, up to the next one that is worth sharing
; or to the end.
define private void @advance(ptr %team) {
entry:
  %steps.p = getelementptr %team, ptr %team, i64 0, i32 8
  %steps = load ptr, ptr %steps.p
  %first.p = getelementptr %team, ptr %team, i64 0, i32 9
  %first = load i64, ptr %first.p
  %last.p = getelementptr %team, ptr %team, i64 0, i32 10
  %last = load i64, ptr %last.p
  %repeats.p = getelementptr %team, ptr %team, i64 0, i32 11
  %end.p = getelementptr %team, ptr %team, i64 0, i32 13
  %start = load i64, ptr %end.p
  br label %next
next:
  %at = phi i64 [ %start, %entry ], [ %end, %alone ], [ %first, %again ]
  %over = icmp sge i64 %at, %last
  br i1 %over, label %repeat, label %open
repeat:
  %repeats = load i64, ptr %repeats.p
  %repeats1 = sub i64 %repeats, 1
  store i64 %repeats1, ptr %repeats.p
  %more = icmp sgt i64 %repeats1, 0
  br i1 %more, label %again, label %finish
again:
  br label %next
finish:
  %active.p = getelementptr %team, ptr %team, i64 0, i32 6
  store atomic i64 0, ptr %active.p release, align 8
  %finished.p = getelementptr %team, ptr %team, i64 0, i32 4
  store atomic i64 1, ptr %finished.p release, align 8
  ret void
open:
  %found = call { i64, i64 } @group(ptr %steps, i64 %at, i64 %last)
  %end = extractvalue { i64, i64 } %found, 0
  %total = extractvalue { i64, i64 } %found, 1
  %shared = icmp sgt i64 %total, 1
  br i1 %shared, label %publish, label %alone
alone:
  call void @in_order(ptr %steps, i64 %at, i64 %end)
  br label %next
publish:
  %at.p = getelementptr %team, ptr %team, i64 0, i32 12
  store i64 %at, ptr %at.p
  store i64 %end, ptr %end.p
  %total.p = getelementptr %team, ptr %team, i64 0, i32 14
  store i64 %total, ptr %total.p
  %pending.p = getelementptr %team, ptr %team, i64 0, i32 2
  store atomic i64 %total, ptr %pending.p monotonic, align 8
  store atomic i64 %total, ptr %team release, align 8
  ret void
}

; Does parts of the published group as long as there are any; the number done.
define private i64 @claim(ptr %team) {
entry:
  %seen = load atomic i64, ptr %team monotonic, align 8
  %any = icmp sgt i64 %seen, 0
  br i1 %any, label %take, label %nothing
nothing:
  ret i64 0
take:
  %done = phi i64 [ 0, %entry ], [ %done1, %peek ]
  %left = atomicrmw sub ptr %team, i64 1 acq_rel, align 8
  %mine = icmp sgt i64 %left, 0
  br i1 %mine, label %locate, label %settle
locate:
  %steps.p = getelementptr %team, ptr %team, i64 0, i32 8
  %steps = load ptr, ptr %steps.p
  %group.p = getelementptr %team, ptr %team, i64 0, i32 12
  %group = load i64, ptr %group.p
  %total.p = getelementptr %team, ptr %team, i64 0, i32 14
  %total = load i64, ptr %total.p
  %part = sub i64 %total, %left
  br label %walk
walk:
  %i = phi i64 [ %group, %locate ], [ %i1, %skip ]
  %at = phi i64 [ %part, %locate ], [ %at1, %skip ]
  %step = getelementptr %step, ptr %steps, i64 %i
  %parts.p = getelementptr %step, ptr %step, i64 0, i32 3
  %parts = load i64, ptr %parts.p
  %here = icmp slt i64 %at, %parts
  br i1 %here, label %work, label %skip
skip:
  %at1 = sub i64 %at, %parts
  %i1 = add i64 %i, 1
  br label %walk
work:
  call void @call(ptr %step, i64 %at)
  %done1 = add i64 %done, 1
  br label %peek
peek:
  %now = load atomic i64, ptr %team monotonic, align 8
  %again = icmp sgt i64 %now, 0
  br i1 %again, label %take, label %settle
settle:
  %n = phi i64 [ %done, %take ], [ %done1, %peek ]
  %some = icmp sgt i64 %n, 0
  br i1 %some, label %account, label %out
account:
  %pending.p = getelementptr %team, ptr %team, i64 0, i32 2
  %before = atomicrmw sub ptr %pending.p, i64 %n acq_rel, align 8
  %all = icmp eq i64 %before, %n
  br i1 %all, label %go_on, label %out
go_on:
  call void @advance(ptr %team)
  br label %out
out:
  ret i64 %n
}

; A short wait; after `busy spins` of them in a row, gives the core away each time. Returns the new count.
define private i64 @wait(ptr %team, i64 %count) {
  call void @pause()
  %limit.p = getelementptr %team, ptr %team, i64 0, i32 18
  %limit = load i64, ptr %limit.p
  %long = icmp sge i64 %count, %limit
  br i1 %long, label %give, label %out
give:
  %yield.p = getelementptr %team, ptr %team, i64 0, i32 16
  %yield = load ptr, ptr %yield.p
  %ignored = call i32 %yield()
  ret i64 %count
out:
  %count1 = add i64 %count, 1
  ret i64 %count1
}

; Starts a job up to its first step. Returns how many workers are parked; their states are 2 and the caller must wake
; them.
define private i64 @begin(ptr %team, ptr %steps, i64 %first, i64 %last, i64 %repeats) {
entry:
  %steps.p = getelementptr %team, ptr %team, i64 0, i32 8
  store ptr %steps, ptr %steps.p
  %first.p = getelementptr %team, ptr %team, i64 0, i32 9
  store i64 %first, ptr %first.p
  %last.p = getelementptr %team, ptr %team, i64 0, i32 10
  store i64 %last, ptr %last.p
  %repeats.p = getelementptr %team, ptr %team, i64 0, i32 11
  store i64 %repeats, ptr %repeats.p
  %end.p = getelementptr %team, ptr %team, i64 0, i32 13
  store i64 %first, ptr %end.p
  %finished.p = getelementptr %team, ptr %team, i64 0, i32 4
  store atomic i64 0, ptr %finished.p monotonic, align 8
  %begun.p = getelementptr %team, ptr %team, i64 0, i32 21
  store i64 1, ptr %begun.p
  %active.p = getelementptr %team, ptr %team, i64 0, i32 6
  store atomic i64 1, ptr %active.p seq_cst, align 8
  %workers.p = getelementptr %team, ptr %team, i64 0, i32 19
  %workers = load i64, ptr %workers.p
  br label %test
test:
  %w = phi i64 [ 0, %entry ], [ %w1, %ask ]
  %count = phi i64 [ 0, %entry ], [ %count1, %ask ]
  %more = icmp slt i64 %w, %workers
  br i1 %more, label %ask, label %out
ask:
  %state.p = getelementptr %team, ptr %team, i64 0, i32 23, i64 %w
  %swap = cmpxchg ptr %state.p, i64 1, i64 2 seq_cst seq_cst, align 8
  %parked = extractvalue { i64, i1 } %swap, 1
  %one = zext i1 %parked to i64
  %count1 = add i64 %count, %one
  %w1 = add i64 %w, 1
  br label %test
out:
  ret i64 %count
}

; The caller's own share of a job that has begun; returns when the job is done.
define void @kf_finish(ptr %team) {
entry:
  %begun.p = getelementptr %team, ptr %team, i64 0, i32 21
  store i64 0, ptr %begun.p
  call void @advance(ptr %team)
  br label %test
test:
  %waits = phi i64 [ 0, %entry ], [ 0, %work ], [ %waits1, %idle ]
  %finished.p = getelementptr %team, ptr %team, i64 0, i32 4
  %finished = load atomic i64, ptr %finished.p acquire, align 8
  %over = icmp ne i64 %finished, 0
  br i1 %over, label %out, label %work
work:
  %n = call i64 @claim(ptr %team)
  %some = icmp sgt i64 %n, 0
  br i1 %some, label %test, label %idle
idle:
  %waits1 = call i64 @wait(ptr %team, i64 %waits)
  br label %test
out:
  ret void
}

; Runs steps [first, last) `repeats` times. 0: done. Otherwise so many workers must be woken, and then kf_finish called.
define i64 @kf_run(ptr %team, ptr %steps, i64 %first, i64 %last, i64 %repeats) {
entry:
  br label %look
look:
  %at = phi i64 [ %first, %entry ], [ %end, %next ]
  %over = icmp sge i64 %at, %last
  br i1 %over, label %alone, label %next
next:
  %found = call { i64, i64 } @group(ptr %steps, i64 %at, i64 %last)
  %end = extractvalue { i64, i64 } %found, 0
  %total = extractvalue { i64, i64 } %found, 1
  %shared = icmp sgt i64 %total, 1
  br i1 %shared, label %together, label %look
alone:
  call void @kf_serial(ptr %steps, i64 %first, i64 %last, i64 %repeats)
  ret i64 0
together:
  %asleep = call i64 @begin(ptr %team, ptr %steps, i64 %first, i64 %last, i64 %repeats)
  %awake = icmp eq i64 %asleep, 0
  br i1 %awake, label %finish, label %out
finish:
  call void @kf_finish(ptr %team)
  br label %out
out:
  ret i64 %asleep
}

; A worker's life: takes part in jobs, spins for the next one, then parks.
; 0: the team is stopped. 1: parked; block until woken, then call again.
define i64 @kf_work(ptr %team, i64 %worker) {
entry:
  %state.p = getelementptr %team, ptr %team, i64 0, i32 23, i64 %worker
  store atomic i64 0, ptr %state.p seq_cst, align 8
  %active.p = getelementptr %team, ptr %team, i64 0, i32 6
  %stop.p = getelementptr %team, ptr %team, i64 0, i32 20
  %limit.p = getelementptr %team, ptr %team, i64 0, i32 17
  %limit = load i64, ptr %limit.p
  br label %test
test:
  %waits = phi i64 [ 0, %entry ], [ 0, %work ], [ %waits1, %busy ], [ 0, %spin ], [ 0, %back ]
  %idles = phi i64 [ 0, %entry ], [ 0, %work ], [ 0, %busy ], [ %idles1, %spin ], [ 0, %back ]
  %stop = load atomic i64, ptr %stop.p acquire, align 8
  %stopped = icmp ne i64 %stop, 0
  br i1 %stopped, label %end, label %work
end:
  ret i64 0
work:
  %n = call i64 @claim(ptr %team)
  %some = icmp sgt i64 %n, 0
  br i1 %some, label %test, label %look
look:
  %active = load atomic i64, ptr %active.p acquire, align 8
  %job = icmp ne i64 %active, 0
  br i1 %job, label %busy, label %idle
busy:
  %waits1 = call i64 @wait(ptr %team, i64 %waits)
  br label %test
idle:
  %idles1 = add i64 %idles, 1
  %enough = icmp sgt i64 %idles1, %limit
  br i1 %enough, label %park, label %spin
spin:
  call void @pause()
  br label %test
park:
  store atomic i64 1, ptr %state.p seq_cst, align 8
  %late = load atomic i64, ptr %active.p seq_cst, align 8
  %quiet = icmp eq i64 %late, 0
  br i1 %quiet, label %asleep, label %undo
undo:
  %swap = cmpxchg ptr %state.p, i64 1, i64 0 seq_cst seq_cst, align 8
  %free = extractvalue { i64, i1 } %swap, 1
  br i1 %free, label %back, label %asleep
back:
  br label %test
asleep:
  ret i64 1
}

; A kernel that notes when it is run. Its buffers: the function that reads the clock, the clock's number, where the time
; goes. Two forms, for clock_gettime and for QueryPerformanceCounter.
define void @kf_stamp_posix(ptr %buffers, ptr %dims, i64 %part, i64 %parts) {
  %clock = load ptr, ptr %buffers
  %number.p = getelementptr i64, ptr %buffers, i64 1
  %number = load i64, ptr %number.p
  %number32 = trunc i64 %number to i32
  %out.p = getelementptr ptr, ptr %buffers, i64 2
  %out = load ptr, ptr %out.p
  %ignored = call i32 %clock(i32 %number32, ptr %out)
  ret void
}

define void @kf_stamp_windows(ptr %buffers, ptr %dims, i64 %part, i64 %parts) {
  %clock = load ptr, ptr %buffers
  %out.p = getelementptr ptr, ptr %buffers, i64 2
  %out = load ptr, ptr %out.p
  %ignored = call i32 %clock(ptr %out)
  ret void
}

; So many pauses, to find out how long one takes.
define void @kf_spin(i64 %count) {
entry:
  br label %test
test:
  %n = phi i64 [ 0, %entry ], [ %n1, %body ]
  %more = icmp slt i64 %n, %count
  br i1 %more, label %body, label %out
body:
  call void @pause()
  %n1 = add i64 %n, 1
  br label %test
out:
  ret void
}

; Touches so many bytes of stack from the top down, a page at a time: Windows makes them memory only in this order, and
; kernels do not ask for theirs.
define void @kf_touch(i64 %bytes) {
entry:
  %stack = alloca i8, i64 %bytes
  br label %test
test:
  %at = phi i64 [ %bytes, %entry ], [ %lower, %body ]
  %lower = sub i64 %at, 4096
  %more = icmp sge i64 %lower, 0
  br i1 %more, label %body, label %out
body:
  %p = getelementptr i8, ptr %stack, i64 %lower
  store volatile i8 0, ptr %p
  br label %test
out:
  ret void
}
