// No include guard: included once per instruction set, and once for the code that is of none. A caller
// under a target pragma can inline it only when it is compiled under the same one.

// f(T()) for the type T of a dtype that activations, outputs and biases may have (dtypes.h).
template <class F>
inline void with_dtype(c10::ScalarType dtype, const F& f) {
  switch (dtype) {
    case c10::ScalarType::BFloat16: return f(c10::BFloat16());
    case c10::ScalarType::Half: return f(c10::Half());
    default: return f(float());
  }
}
