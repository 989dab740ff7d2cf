// x / sqrt(mean(x^2) + eps) * weight, for one row a workgroup.

var<workgroup> sums: array<f32, THREADS>;

@compute @workgroup_size(THREADS)
fn main(ids: Ids) {
  let first = row(ids) * x_row();
  if (first >= x_size()) { return; }

  var sum = 0.0;
  for (var i = ids.thread; i < x_row(); i += THREADS) {
    let x = load_x(first + i);
    sum = fma(x, x, sum);
  }
  sums[ids.thread] = sum;
  for (var half = THREADS / 2u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (ids.thread < half) { sums[ids.thread] += sums[ids.thread + half]; }
  }
  workgroupBarrier();

  let scale = 1.0 / sqrt(sums[0] / f32(x_row()) + EPS);
  for (var i = ids.thread; i < x_row(); i += THREADS) {
    store_out(first + i, load_x(first + i) * scale * load_weight(i));
  }
}
